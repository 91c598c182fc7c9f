"""What engines run and what their files store: data, known before a search begins."""
