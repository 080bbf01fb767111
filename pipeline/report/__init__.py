"""The report of one run, or of several side by side. Start in `__main__.py`."""
