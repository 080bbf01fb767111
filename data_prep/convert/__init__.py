"""Conversion of other data formats to canonical JSON Lines."""
