"""Measurements against peers, one script a question. See `python -m benchmarks --help`."""
