"""Build tiny models for the synthetic benchmark."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pipeline.experiments.synthetic_benchmark import SyntheticBenchmark


def tiny_model(benchmark: SyntheticBenchmark, layers: int) -> Qwen3ForCausalLM:
    """Return a model with random weights and the benchmark's vocabulary."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(benchmark.build_tokenizer()), hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)
