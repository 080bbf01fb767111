"""Preprocessing: convert, tokenize and pack paired multilingual records into training shards, without torch."""
