"""Texts with a label each: files, sources, and records in which the label's words are the target."""
