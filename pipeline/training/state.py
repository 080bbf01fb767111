"""Progress of a run."""

import uuid
from dataclasses import dataclass, field


@dataclass
class TrainState:
    """Progress of a run, stored in checkpoints in addition to weights, optimizer state and data position.

    Attributes:
        step: number of finished optimizer steps.
        num_tokens: number of tokens trained on, without padding.
        recent_ce: cross entropies of the last steps, from which a loss jump is detected.
        run_id: random id, made at the first start of a run. That of rank 0 is stored in checkpoints and exports.
    """

    step: int = 0
    num_tokens: int = 0
    recent_ce: list[float] = field(default_factory=list)
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)
