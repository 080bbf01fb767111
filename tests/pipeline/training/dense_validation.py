"""The metrics of a validation, computed in float64 by one process with the dense loss."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_prep.shards.format import ShardSet
from pipeline.config.recipe import load_config
from pipeline.data.micro_batch import MicroBatch, collate, local_normalizers
from pipeline.loss import LossNormalizers, solar_loss_reference
from pipeline.models.adapters import load_exported
from pipeline.models.solar_model import decoder_hidden_states


@torch.no_grad()
def dense_validation(model_dir: Path, recipe: Path, checkpoint: Path) -> dict[str, float]:
    """Compute the loss of an exported model over the validation shards of a recipe.

    Args:
        model_dir: the exported model or adapter. checkpoint: the checkpoint it was made from, for the running means.
    """
    config = load_config(recipe, [])
    model = load_exported(model_dir, torch.float64)
    rows, languages = (
        ShardSet.open(str(config.data.eval_shards)),
        ShardSet.open(config.data.shards).manifest["languages"],
    )
    batches = [collate([row], languages, 0) for row in rows]
    means = load_file(checkpoint / "centres.safetensors")["means"].double() if config.loss.centring else None
    hidden = [
        decoder_hidden_states(model, model.get_input_embeddings()(batch.input_ids), batch).flatten(0, 1)[
            batch.positions
        ]
        for batch in batches
    ]

    def terms(batches: list[MicroBatch], normalizers: LossNormalizers) -> list[float]:
        total = torch.zeros(3, dtype=torch.float64)
        for states, batch in zip(hidden, batches, strict=True):
            total += torch.stack(
                solar_loss_reference(
                    states,
                    model.get_output_embeddings().weight,
                    model.get_input_embeddings().weight,
                    batch.loss_batch,
                    config.loss,
                    config.loss.alignment_weight,
                    normalizers,
                    means,
                )
            )
        return total.tolist()

    names = ("eval_loss", "eval_ce", "eval_alignment")
    expected = dict(zip(names, terms(batches, local_normalizers(batches)), strict=True))
    for number, lang in enumerate(languages):
        parts = [replace(batch, loss_batch=_only(batch, number)) for batch in batches]
        if tokens := local_normalizers(parts).tokens:
            expected[f"eval_ce_{lang}"] = terms(parts, LossNormalizers(tokens, 1.0))[1]
    return expected


def _only(batch: MicroBatch, language: int) -> Any:
    """Return the loss batch with cross-entropy weights of 0 for all other languages."""
    part = batch.loss_batch
    weights: Tensor = torch.ones(len(part.lengths)) if part.ce_weights is None else part.ce_weights
    return replace(part, ce_weights=weights.double() * (part.language == language))


def assert_matches_dense(record: dict[str, float], expected: dict[str, float]) -> None:
    """Compare the record of a validation in fp32 with the dense metrics: same keys, equal up to rounding."""
    others = {"step", "eval_align_cos", "eval_seconds", "best_step", "best_metric"}
    actual = {key: value for key, value in record.items() if key not in others}
    assert len(expected) > 5 and actual == pytest.approx(expected, rel=2e-6, abs=2e-7)
