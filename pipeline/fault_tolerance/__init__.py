"""Fault tolerance: run lock, signals, watchdog and crash-loop limit."""
