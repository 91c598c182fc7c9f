"""`python -m bitsearch`."""

from bitsearch.cli import main

main()
