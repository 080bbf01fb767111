"""Preprocessing: paired multilingual records in, packed training shards out. Knows neither torch nor `pipeline`."""
