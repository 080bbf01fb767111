"""Progress of a run."""

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """Progress of a run, stored in checkpoints in addition to weights, optimizer state and data position.

    Attributes:
        step: number of finished optimizer steps.
        num_tokens: number of tokens trained on, without padding.
        recent_ce: cross entropies of the last steps, from which a loss jump is detected.
    """

    step: int = 0
    num_tokens: int = 0
    recent_ce: list[float] = field(default_factory=list)
