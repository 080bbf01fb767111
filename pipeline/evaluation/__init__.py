"""Evaluation of Hugging Face models: accuracy, agreement across languages, output languages, lm-eval tasks."""
