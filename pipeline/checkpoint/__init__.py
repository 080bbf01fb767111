"""Checkpoints: directory layout, background saving, resuming, and conversion to a different number of ranks."""
