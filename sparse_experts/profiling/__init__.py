"""Where the time of a step goes, from a recorded trace and the compiled program."""
