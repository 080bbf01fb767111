"""Hugging Face models with the vocabulary kept apart from the decoder."""
