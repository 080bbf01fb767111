"""Alignment of the hidden states of a middle layer with ZeRO-3, against plain transformers in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.shards.format import IGNORE
from pipeline.config.recipe import load_config
from pipeline.data.micro_batch import collate
from pipeline.loss import solar_loss_reference
from pipeline.models.adapters import add_adapter
from tests.pipeline.training.hidden_state_ranks import LANGUAGES, VOCAB, packed_rows
from tests.runs import ROOT, TINY, run_forked_ranks, write_recipe

pytestmark = pytest.mark.slow

# Settings that keep ZeRO-3 parameters gathered
RELEASED = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")
MID_ALIGN: dict[str, Any] = {
    "pooling_tokens": "hidden_states", "distance": "infonce", "detach": [], "alignment_weight": 0.7
}  # fmt: skip

# Settings by name. The layer is the second of four by default.
CASES: dict[str, dict[str, Any]] = {
    "full, 1 rank": {"loss": MID_ALIGN, "training__train_micro_batch_size_per_gpu": 4},
    "full, 2 ranks": {"loss": MID_ALIGN, "training__train_micro_batch_size_per_gpu": 2},
    "full, 4 ranks": {"loss": MID_ALIGN},
    "lora, 2 ranks": {
        "loss": MID_ALIGN | {"distance": "cosine", "detach": ["pivot"], "layer": 3},
        "model__adapter": {"r": 4},
        "model__attn_implementation": "sdpa",
        "model__activation_checkpointing": False,
        "training__train_micro_batch_size_per_gpu": 2,
    },
    "shared rows, 2 ranks": {
        "loss": MID_ALIGN | {"pooling": "last", "layer": 1},
        "training__train_micro_batch_size_per_gpu": 4,
        "training__sequence_parallel_size": 2,
    },
}


def dense_gradients(recipe: Path) -> dict[str, Tensor]:
    """Run one sequence at a time through transformers with `output_hidden_states`, then the dense loss and autograd."""
    config = load_config(recipe, [])
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64, attn_implementation="eager")
    add_adapter(model, config.model.adapter, config.seed)
    last, middle = [], []
    for row in packed_rows():
        ends = row.seq_lens.cumsum()
        for start, end in zip(ends - row.seq_lens, ends, strict=True):
            ids = torch.from_numpy(row.input_ids[start:end]).long()[None]
            hidden_states = model.get_decoder()(ids, output_hidden_states=True, use_cache=False).hidden_states
            targets = torch.from_numpy(row.labels[start:end] != IGNORE).nonzero().squeeze(1)
            last.append(hidden_states[-1][0, targets - 1])
            middle.append(hidden_states[config.loss.layer or 2][0, targets - 1])
    loss_batch = collate(packed_rows(), LANGUAGES, 0).loss_batch
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    normalizers, weight = loss_batch.normalizers(), config.loss.alignment_weight
    loss, ce, alignment = solar_loss_reference(
        torch.cat(last), head, embedding, loss_batch, config.loss, weight, normalizers, layer_hidden=torch.cat(middle)
    )
    loss.backward()
    names = {id(embedding): "embedding", id(head): "head"}
    gradients = {names.get(id(p), f"model.{name}"): p.grad for name, p in model.named_parameters() if p.requires_grad}
    sums = {"loss": loss, "ce_sum": ce * normalizers.tokens, "distance_sum": alignment * normalizers.pairs}
    sums["eval_distance_sum"] = sums["distance_sum"]
    return {name: value.detach() for name, value in sums.items()} | gradients


def test_hidden_state_alignment_matches_transformers(tmp_path: Path) -> None:
    """Release every parameter after use, so that backward gathers those of the layer again."""
    ds = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    ds["zero_optimization"] |= dict.fromkeys(RELEASED, 0)
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    torch.manual_seed(0)
    fields = {**TINY, "num_hidden_layers": 4, "vocab_size": VOCAB, "tie_word_embeddings": False}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).save_pretrained(tmp_path / "model")
    recipes = {
        name: write_recipe(
            tmp_path / f"{number}.yaml",
            tmp_path,
            tmp_path,
            **{
                "deepspeed": str(tmp_path / "ds.json"),
                "model": {"path": str(tmp_path / "model"), "vocab_multiple": 4, "activation_checkpointing": True},
            }
            | changes,
        )
        for number, (name, changes) in enumerate(CASES.items())
    }
    for ranks in (1, 2, 4):
        names = [name for name in CASES if f"{ranks} rank" in name]
        script = "tests/pipeline/training/hidden_state_ranks.py"
        run_forked_ranks(ranks, [script, *(str(recipes[name]) for name in names)])
        for name in names:
            actual, expected = torch.load(recipes[name].with_suffix(f".{ranks}.pt")), dense_gradients(recipes[name])
            assert actual.keys() == expected.keys()
            total = torch.stack([value.norm() for value in expected.values() if value.ndim]).norm()
            for key, value in expected.items():
                scale = value.norm() + (1e-3 * total if value.ndim else 0)
                assert (actual[key] - value).norm() <= 2e-6 * scale, (name, key)
