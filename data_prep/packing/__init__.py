"""Packing of canonical records into shards."""
