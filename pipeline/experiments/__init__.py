"""The experiment: does alignment make knowledge move between languages? `python -m pipeline.experiments` runs it."""
