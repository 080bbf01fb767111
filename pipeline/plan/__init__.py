"""Predict memory, communication and step time of a run from its configuration: no weights, no GPU, no process group."""
