"""What keeps a run safe: one run per directory, signals, hung and lost ranks, restarts that get nowhere."""
