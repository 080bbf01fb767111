"""Experiment: does alignment transfer knowledge between languages? Run it with `python -m pipeline.experiments`."""
