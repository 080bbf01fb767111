"""A tiny model for a world's words."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pipeline.experiments.world import World


def tiny_model(world: World, layers: int) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(world.tokenizer()), hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)
