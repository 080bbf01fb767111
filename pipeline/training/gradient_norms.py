"""Measure the gradient norms of the two loss terms separately."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from pipeline.data.micro_batch import MicroBatch
from pipeline.loss import LossNormalizers
from pipeline.zero3.engine import ZeroEngine


def term_gradient_norms(
    engine: ZeroEngine, micro_batches: Sequence[MicroBatch], normalizers: LossNormalizers
) -> dict[str, float | None]:
    """Compute the gradient norm of the cross entropy alone and of the unweighted alignment term alone.

    Each norm takes one forward and backward pass over the micro-batches, before the pass of the optimizer step. Both
    leave the engine unchanged. Collective: all ranks must call it.

    Args:
        engine: the engine.
        micro_batches: this rank's micro-batches of the global batch.
        normalizers: counts over the global batch.

    Returns:
        `ce_grad_norm` and `align_grad_norm`, over all parameters and before clipping. A norm is None if it is not
        finite. `align_grad_norm` is also None if the global batch has no pairs.
    """
    without_ce = [_without_cross_entropy(batch) for batch in micro_batches]
    return {
        "ce_grad_norm": engine.measure_grad_norm(micro_batches, 0.0, normalizers),
        "align_grad_norm": engine.measure_grad_norm(without_ce, 1.0, normalizers) if normalizers.pairs else None,
    }


def _without_cross_entropy(batch: MicroBatch) -> MicroBatch:
    """Return the micro-batch with weight 0 in the cross entropy for every sequence."""
    weights = torch.zeros(len(batch.loss_batch.lengths), dtype=torch.float64)
    return replace(batch, loss_batch=replace(batch.loss_batch, ce_weights=weights, layout=None))
