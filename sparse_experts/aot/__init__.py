"""Compiles the train step for a TPU slice without a TPU: memory, collectives, estimated time."""
