"""The progress of a run."""

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """What a checkpoint stores beside weights, optimizer state and data position.

    Attributes:
        step: number of optimizer steps done.
        num_tokens: number of tokens trained on, without padding.
        recent_ce: cross entropies of the last steps, against which a jump is measured.
    """

    step: int = 0
    num_tokens: int = 0
    recent_ce: list[float] = field(default_factory=list)
