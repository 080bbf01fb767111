"""Stop before an update if the loss or the gradients are not finite or the loss has jumped, or after a validation."""

import math
import statistics
from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from pipeline.common import distributed
from pipeline.common.errors import LossError
from pipeline.data.micro_batch import MicroBatch
from pipeline.loss import LossNormalizers
from pipeline.zero3.engine import ZeroEngine

MIN_LOSSES = 20  # minimum number of losses to detect a jump


def raise_nonfinite(
    what: str,
    engine: ZeroEngine,
    micro_batches: Sequence[MicroBatch],
    weight: float,
    normalizers: LossNormalizers,
    step: int,
) -> NoReturn:
    """Repeat the step to locate the first micro-batches with non-finite gradients, then raise.

    Collective: all ranks must call it.

    Args:
        what: the quantity that is not finite, for the message.
        micro_batches: this rank's micro-batches of the step.
        weight: the alignment weight of the step.

    Raises:
        LossError: always. The message names the ranks and pair ids.
    """
    loss_scale = engine.loss_scale
    engine.ds_engine.optimizer.loss_scale = 1.0  # one that is too large for fp16 makes all gradients overflow
    culprits: list[str] = []
    for batch in micro_batches:
        local = None
        if not local_gradients_finite(engine, batch, weight, normalizers):
            local = f"{distributed.rank_label()}, pair ids {', '.join(batch.pair_ids)}"
        culprits = [text for text in distributed.all_gather_object(local) if text is not None]
        if culprits:
            break
    cause = "Repeating the step gave finite gradients: probably a hardware fault. Restart; if it recurs, on other nodes"
    if loss_scale > 1:
        cause = (
            f"With a loss scale of 1 in place of {loss_scale:g}, its gradients are finite. Lower fp16.min_loss_scale, "
            "or set fp16.loss_scale to 0, which adapts the scale"
        )
    if culprits:
        cause = f"{'; '.join(culprits)}. Lower the learning rate or inspect these records"
    raise LossError(f"step {step}: the {what} is not finite; stopped before the update. {cause}")


def local_gradients_finite(
    engine: ZeroEngine, batch: MicroBatch, alignment_weight: float, normalizers: LossNormalizers
) -> bool:
    """Repeat a micro-step and check this rank's decoder gradients before they are reduced.

    Collective: all ranks must call it.
    """
    finite: list[Tensor] = []
    hooks = [
        p.register_hook(lambda gradient: finite.append(gradient.isfinite().all()))
        for p in engine.ds_engine.module.parameters()
        if p.requires_grad
    ]
    try:
        engine.forward_backward(batch, alignment_weight, normalizers)
    finally:
        for hook in hooks:
            hook.remove()
    return all(bool(one) for one in finite)


def check_validation(ce: float | None, step: int) -> None:
    """Check that a validation has a finite cross entropy, before the weights are saved or the run ends.

    Raises:
        LossError: it has not. The last update has probably spoiled the weights.
    """
    if ce is not None and not math.isfinite(ce):
        raise LossError(
            f"step {step}: the cross entropy on data.eval_shards is not finite. Lower the learning rate or inspect "
            "these records, and restart from the newest checkpoint"
        )


def check_loss_jump(ce: float, recent_ce: Sequence[float], step: int, max_jump: float | None) -> None:
    """Check that the cross entropy has not jumped.

    Args:
        ce: cross entropy of the step, in nats per target token.
        recent_ce: cross entropies of the preceding steps.
        max_jump: maximum allowed increase over the median of `recent_ce`; None: no check.

    Raises:
        LossError: the cross entropy exceeds the median by more than `max_jump`.
    """
    if max_jump is None or len(recent_ce) < MIN_LOSSES:
        return
    median = statistics.median(recent_ce)
    if ce > median + max_jump:
        raise LossError(
            f"step {step}: the cross entropy jumped to {ce:.3f} from a median of {median:.3f} over the last "
            f"{len(recent_ce)} steps; stopped before the update. Lower the learning rate, or raise "
            "training.max_loss_jump, and restart from the newest checkpoint"
        )
