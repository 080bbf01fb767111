"""Settings of a packing run."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError

# Smallest and largest default packing window, in input bytes. The smallest holds about a thousand groups. Windows above
# the largest would use more memory and hardly improve the packing efficiency.
WINDOW_BYTES = (8 << 20, 64 << 20)
WINDOWS = 16  # default number of packing windows, if their size is within those bounds

SUPERVISE = ("all", "last")
ON_BAD_RECORD = ("error", "skip")

_MINIMUMS = {
    "max_seq_length": 1,
    "rows_per_shard": 1,
    "max_sequences_per_row": 0,
    "translations_per_row": 0,
    "window_bytes": 0,
    "seed": 0,
}


@dataclass(frozen=True)
class PackSettings:
    """Settings that determine the bytes of a shard directory, together with the sources and the tokenizer.

    Attributes:
        max_seq_length: Maximum number of tokens in a row.
        pivot: Language that every group is aligned to.
        seed: Determines the order of groups and rows.
        max_sequences_per_row: Maximum number of sequences in a row, 0 for no limit.
        translations_per_row: Maximum number of translations of one example in a row, 0 for no limit. The pivot is
            repeated in each of the rows that hold its other translations.
        pairs_only: Whether to drop examples of which no translation is left.
        truncate: Whether to truncate pairs that are too long for a row instead of dropping them.
        rows_per_shard: Number of rows in every shard except the last.
        window_bytes: Input bytes in a packing window. Only groups of the same window are packed together, and the
            memory per rank grows with this size. 0 for 1/16 of the input, within the bounds `WINDOW_BYTES`.
        supervise: "all" to train on all responses of a conversation, or "last" for the last one only.
        on_bad_record: "error" to stop at a record that cannot be packed, or "skip" to drop and count it.
        chat_template: Jinja template to use instead of the tokenizer's own, or None.
        chat_template_kwargs: Values of the template's variables, such as `enable_thinking`.

    Raises:
        UserError: A number is out of range.
    """

    max_seq_length: int = 2048
    pivot: str = "en"
    seed: int = 0
    max_sequences_per_row: int = 0
    translations_per_row: int = 0
    pairs_only: bool = False
    truncate: bool = False
    rows_per_shard: int = 1024
    window_bytes: int = 0
    supervise: str = "all"
    on_bad_record: str = "error"
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, minimum in _MINIMUMS.items():
            if getattr(self, name) < minimum:
                raise UserError(f"--{name} must be at least {minimum}, not {getattr(self, name)}")
        if self.seed >= 1 << 64:
            raise UserError(f"--seed must be below 2**64, not {self.seed}")

    def count_windows(self, input_bytes: int) -> int:
        """Return the number of packing windows of an input."""
        smallest, largest = WINDOW_BYTES
        window_bytes = self.window_bytes or min(max(input_bytes // WINDOWS, smallest), largest)
        return -(-input_bytes // window_bytes)


def check_same_settings(head: dict[str, Any], manifest: dict[str, Any], path: Path) -> None:
    """Check that a finished output was packed with the same settings, tokenizer and sources.

    Args:
        head: The head of the manifest that a packing run would write.
        manifest: The manifest of the output. Settings that it lacks are newer, and had their defaults.
        path: The output, for the error message.

    Raises:
        UserError: Something differs.
    """
    defaults = asdict(PackSettings())
    for key, value in head.items():
        if manifest.get(key, defaults.get(key)) != value:
            if key == "packer_version":
                raise UserError(
                    f"{path}: made by another version of the packer, which may pack the same input differently; train "
                    "on it as it is, or remove it or give another --output to pack again"
                )
            raise UserError(
                f"{path}: made with a different `{key}`; remove it, restore that setting, or give another --output"
            )
