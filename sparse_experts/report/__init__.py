"""A page that shows a run: one JSON blob (`blob.py`), one template, and what fills them."""
