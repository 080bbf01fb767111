"""Shard directories: format, verification, statistics and inspection."""
