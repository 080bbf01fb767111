"""Training loop, schedules, checks and metrics."""
