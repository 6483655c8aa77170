"""Splits the time of a step by parts of the model, from a recorded trace and the compiled program."""
