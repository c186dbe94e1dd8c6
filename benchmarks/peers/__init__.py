"""The same work in other libraries: `python -m benchmarks.peers`; see benchmarks/README.md."""
