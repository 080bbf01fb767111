"""Tensors of an export have the names and shapes of the files on the Hub."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.checkpoint.hf_weights import file_tensors
from tests.runs import TINY


@pytest.mark.parametrize(("family", "expert"), [("qwen3_moe", "mlp.experts.3.up_proj"), ("qwen3", None)])
def test_export_tensors_are_those_of_hub_files(family: str, expert: str | None, tmp_path: Path) -> None:
    """transformers merges the experts when it loads a model; its own files hold them one by one."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = AutoConfig.for_model(**{**TINY, **experts, "vocab_size": 61, "model_type": family})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    parameters = [(name, p.detach()) for name, p in model.named_parameters()]
    tensors = dict(file_tensors(config, parameters))
    assert (expert is not None) == (f"model.layers.1.{expert}.weight" in tensors)
    assert (expert is not None) == (tensors.keys() != dict(parameters).keys())
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
