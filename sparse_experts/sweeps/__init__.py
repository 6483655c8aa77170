"""Trains and compares arms x seeds; each run is trained once and cached."""
