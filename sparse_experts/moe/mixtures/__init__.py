"""Layers that stand where `MoELayer` does and assign no token to an expert."""
