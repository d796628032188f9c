"""Benchmarks: `./dev benchmark NAME` runs one, see README.md."""
