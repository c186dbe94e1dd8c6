"""Benchmarks: `python -m benchmarks.speed` and `python -m benchmarks.peers`; see README.md."""
