"""Claims of papers: fixed in a file before anything runs, and judged by a rule that the file fixes."""
