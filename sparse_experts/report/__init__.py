"""Shows results: a page of runs (one JSON blob, one template), and in `plots` every picture we draw."""
