"""Checkpoints: directory layout, background saving, resuming, and conversion to another number of ranks."""
