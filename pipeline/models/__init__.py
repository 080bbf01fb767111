"""Hugging Face models with the vocabulary matrices separated from the decoder."""
