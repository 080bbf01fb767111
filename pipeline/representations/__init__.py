"""Cross-lingual similarity and language separability of a model's hidden states."""
