"""Predict memory, communication and step time of a run from its configuration, without weights or a GPU."""
