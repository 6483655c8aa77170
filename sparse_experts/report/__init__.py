"""Shows results: a page of runs (one JSON blob, one template), and through `plots` every picture of the project."""
