"""Documents: files, tokenizers, windows and masked spans."""
