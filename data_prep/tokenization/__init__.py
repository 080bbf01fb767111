"""Tokenizers, chat templates and the encoding of conversations."""
