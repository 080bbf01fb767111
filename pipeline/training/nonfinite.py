"""Stop before an update if the loss is not finite or has jumped, and locate the cause."""

import statistics

from pipeline.common import distributed
from pipeline.common.errors import AgreedError, UserError
from pipeline.data.micro_batch import MicroBatch
from pipeline.loss import LossNormalizers
from pipeline.training.state import TrainState
from pipeline.zero3.engine import ZeroEngine

LOSSES_NEEDED = 20


def blame(
    what: str, zero: ZeroEngine, window: list[MicroBatch], weight: float, normalizers: LossNormalizers, step: int
) -> None:
    """Repeat the step to find the first micro-batches whose own gradients are not finite, and end with their names.

    Raises:
        AgreedError: always.
    """
    culprits: list[str] = []
    for batch in window:
        mine = None
        if not zero.gradients_finite(batch, weight, normalizers):
            mine = f"{distributed.rank_label()}, problems {', '.join(batch.pair_ids)}"
        culprits = [text for text in distributed.all_gather_object(mine) if text is not None]
        if culprits:
            break
    where = "; ".join(culprits) or "repeating the step gave finite gradients, which speaks for a fault of the hardware"
    raise AgreedError(
        f"step {step}: the {what} is not finite; stopped before the update. {where}. "
        "Lower the learning rate or look at these records"
    )


def check_jump(ce: float, state: TrainState, max_jump: float | None) -> None:
    """Raises UserError where the cross entropy is `max_jump` above the median of the last steps."""
    if max_jump is None or len(state.recent_ce) < LOSSES_NEEDED:
        return
    usual = statistics.median(state.recent_ce)
    if ce > usual + max_jump:
        raise UserError(
            f"step {state.step + 1}: the cross entropy jumped to {ce:.3f} from a median of {usual:.3f} over the last "
            f"{len(state.recent_ce)} steps; stopped before the update. Lower the learning rate, or raise "
            "training.max_loss_jump, and start again from the newest checkpoint"
        )
