"""Training: state, step, optimizer, loop, checkpoints, evaluation and sampling."""
