"""Benchmarks. Nothing outside this package imports it."""
