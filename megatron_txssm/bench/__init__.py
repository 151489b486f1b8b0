"""Benchmarks: how fast models of one size are, and what that costs."""
