"""Mixed-precision search for language models."""
