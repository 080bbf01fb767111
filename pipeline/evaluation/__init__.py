"""Evaluation of Hugging Face models: accuracy, agreement across languages, languages of outputs, lm-eval tasks."""
