"""Deterministic, resumable data loading over packed shards."""
