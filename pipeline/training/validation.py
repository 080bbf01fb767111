"""Validation: the loss over all of `data.eval_shards`."""

from collections.abc import Callable

import torch

from pipeline.data.micro_batch import MicroBatch
from pipeline.data.sequential_loader import SequentialLoader
from pipeline.loss import LossNormalizers
from pipeline.training.preflight import PreparedRun
from pipeline.training.state import TrainState
from pipeline.zero3.engine import ZeroEngine

# All-reduces the counts of a micro-step. Returns them, and whether to stop because of a signal.
Synchronize = Callable[[MicroBatch], tuple[LossNormalizers, bool]]


def is_due(run: PreparedRun, state: TrainState) -> bool:
    """Return whether to validate after the current step. False if that has already been done."""
    eval_steps = run.config.training.eval_steps
    if run.eval_loader is None or state.step in (0, state.validation.step):
        return False
    return state.step == run.max_steps or (eval_steps is not None and state.step % eval_steps == 0)


def validate(
    engine: ZeroEngine, loader: SequentialLoader, alignment_weight: float, synchronize: Synchronize
) -> dict[str, float | None] | None:
    """Compute the validation metrics over all rows of a loader. Collective: all ranks must call it.

    Sums over target tokens and pairs are accumulated in float64 and divided by the counts of the whole data set, so the
    metrics do not depend on the number of ranks or the micro-batch size, except for rounding. InfoNCE is the exception:
    its negatives are the other sequences of the micro-step.

    Args:
        engine: the engine; left unchanged.
        loader: this rank's micro-batches.
        alignment_weight: weight of the alignment loss in `eval_loss`.
        synchronize: called before each micro-step.

    Returns:
        `eval_loss`, `eval_ce`, `eval_alignment` and `eval_align_cos`, the latter two None if there are no pairs, and
        `eval_ce_LANG` for each language with target tokens. None if a signal has stopped the validation.
    """
    languages = loader.languages
    sums = torch.zeros(3 + 2 * len(languages), dtype=torch.float64, device=engine.device)
    tokens, pairs = 0.0, 0.0
    for batch in loader:
        normalizers, stopping = synchronize(batch)
        if stopping:
            return None
        result = engine.evaluate(batch, normalizers)
        scalars = torch.stack([result.ce_sum, result.distance_sum, result.cosine_sum])
        sums += torch.cat([scalars, result.language_ce, result.language_tokens]).double()
        tokens, pairs = tokens + normalizers.tokens, pairs + normalizers.pairs
    ce_sum, distance_sum, cosine_sum, *by_language = sums.tolist()
    ce = ce_sum / max(tokens, 1)
    alignment = distance_sum / pairs if pairs else None
    metrics: dict[str, float | None] = {
        "eval_loss": ce + alignment_weight * (alignment or 0.0),
        "eval_ce": ce,
        "eval_alignment": alignment,
        "eval_align_cos": cosine_sum / pairs if pairs else None,
    }
    language_ce, language_tokens = by_language[: len(languages)], by_language[len(languages) :]
    return metrics | {
        f"eval_ce_{lang}": s / n for lang, s, n in zip(languages, language_ce, language_tokens, strict=True) if n
    }
