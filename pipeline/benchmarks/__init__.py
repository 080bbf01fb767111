"""Benchmarks. No other package imports this one."""
