"""Benchmarks: `python -m pytest benchmarks`; see docs/performance.md for the method and the results."""
