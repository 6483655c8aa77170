"""Layers that take the place of `MoELayer` and assign no token to an expert."""
