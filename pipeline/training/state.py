"""The state of a run beside weights and data position."""

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """What a run needs beside weights and loader to go on where it was.

    Attributes:
        step: steps done. num_tokens: real tokens seen. recent_ce: cross entropies of the last steps.
    """

    step: int = 0
    num_tokens: int = 0
    recent_ce: list[float] = field(default_factory=list)
