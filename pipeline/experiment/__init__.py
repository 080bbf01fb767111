"""The experiment: does alignment make knowledge move between languages? `python -m pipeline.experiment` runs it."""
