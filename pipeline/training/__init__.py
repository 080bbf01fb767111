"""The training loop with its schedules, checks and metrics."""
