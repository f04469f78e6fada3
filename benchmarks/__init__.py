"""Benchmarks against other libraries; `python -m benchmarks` runs them."""
