"""One script a question; each prints a table and, last, one JSON line. Run with `python -m benchmarks.NAME`."""
