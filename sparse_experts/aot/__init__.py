"""The train step compiled for a TPU slice on a machine without one: memory, collectives, estimated time."""
