"""Do translations lie together in a model's hidden states, and do languages lie apart? Start in `__main__.py`."""
