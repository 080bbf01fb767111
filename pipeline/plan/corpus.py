"""Preprocessing at scale: files, disk, memory and time of `python -m data_prep pack` for a number of pairs.

Tokenizing, the rows of a shard and their writing are cut into independent parts, so their time divides by the ranks.
One term does not scale with the data but with its square: each window of groups looks into the index of each piece.
"""

import math
from dataclasses import dataclass

from data_prep.packing.settings import WINDOW_BYTES, WINDOWS, PackSettings
from data_prep.readers import SPLIT_BYTES, SPLITS

# Measured; docs/data.md and docs/scaling.md say how.
RECORD_BYTES = 724  # a line of JSON: a word problem with its chain of thought, mean of ten languages
RECORD_TOKENS = 136  # in a vocabulary of 16k
TOKENS_PER_SECOND = 1.11e6  # of one core, everything included
INDEX_SECONDS = 1.0e-4  # to open a piece's index and take a window's batch, from the page cache
SHARD_BYTES = 2.34  # of Parquet, per token
WORK_BYTES = 4.0  # of a token in the work folder
RANK_BYTES = 480e6  # of one rank, whatever the input
FILL = 0.995


@dataclass(frozen=True)
class Corpus:
    """A packing run. `sequences_per_group`: of one problem, its pivot included."""

    pairs: float
    ranks: int
    max_seq_length: int = 4096
    sequences_per_group: int = 10

    @property
    def records(self) -> float:
        return self.pairs * self.sequences_per_group / (self.sequences_per_group - 1)

    @property
    def input_bytes(self) -> float:
        return self.records * RECORD_BYTES

    @property
    def tokens(self) -> float:
        return self.records * RECORD_TOKENS

    @property
    def rows(self) -> int:
        return math.ceil(self.tokens / FILL / self.max_seq_length)

    @property
    def pieces(self) -> int:
        """Files of the work folder: two for each, and one for each window and shard."""
        return math.ceil(self.input_bytes / min(max(self.input_bytes / SPLITS, SPLIT_BYTES[0]), SPLIT_BYTES[1]))

    @property
    def windows(self) -> int:
        return math.ceil(self.input_bytes / min(max(self.input_bytes / WINDOWS, WINDOW_BYTES[0]), WINDOW_BYTES[1]))

    @property
    def shards(self) -> int:
        return math.ceil(self.rows / PackSettings.rows_per_shard)

    @property
    def disk_bytes(self) -> float:
        """Work folder and shards together, at the end of the run."""
        return self.tokens * (SHARD_BYTES + WORK_BYTES)

    @property
    def index_seconds(self) -> float:
        """Of all ranks together."""
        return self.pieces * self.windows * INDEX_SECONDS

    @property
    def seconds(self) -> float:
        """With one core for each rank; whole parts only, so the last round counts in full."""
        rounds = math.ceil(self.pieces / self.ranks) * self.ranks / self.pieces
        return (self.tokens / TOKENS_PER_SECOND * rounds + self.index_seconds) / self.ranks
