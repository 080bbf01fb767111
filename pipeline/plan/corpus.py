"""Estimate files, disk and time of `python -m data_prep pack` for a number of pairs.

Tokenization, packing and shard writing consist of independent parts, so their time scales with 1 / ranks. One term
grows with the square of the data, because each packing window reads the index of each split.
"""

import math
from dataclasses import dataclass

from data_prep.packing.settings import WINDOW_BYTES, WINDOWS, PackSettings
from data_prep.readers import SPLIT_BYTES, SPLITS

# Measured as described in docs/data.md and docs/scaling.md.
RECORD_BYTES = 724  # a JSON line: a word problem with its chain of thought, mean of ten languages
RECORD_TOKENS = 136  # with a vocabulary of 16k
TOKENS_PER_SECOND = 1.39e6  # on one core, end to end
INDEX_SECONDS = 1.0e-4  # to open the index of an input split and read the entries of a window, from the page cache
SHARD_BYTES = 2.34  # Parquet bytes per token
WORK_BYTES = 4.0  # bytes in the work folder per token
RANK_BYTES = 480e6  # memory per rank, independent of the input
PACKING_EFFICIENCY = 0.995


@dataclass(frozen=True)
class PackingRun:
    """A packing run on a number of ranks.

    Attributes:
        sequences_per_group: number of languages per example, including the pivot.
    """

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
        return math.ceil(self.tokens / PACKING_EFFICIENCY / self.max_seq_length)

    @property
    def splits(self) -> int:
        """Number of input splits. The work folder has two files for each, and one file for each window and shard."""
        return math.ceil(self.input_bytes / min(max(self.input_bytes / SPLITS, SPLIT_BYTES[0]), SPLIT_BYTES[1]))

    @property
    def windows(self) -> int:
        """Number of packing windows. Only groups of the same window are packed together."""
        return math.ceil(self.input_bytes / min(max(self.input_bytes / WINDOWS, WINDOW_BYTES[0]), WINDOW_BYTES[1]))

    @property
    def shards(self) -> int:
        return math.ceil(self.rows / PackSettings.rows_per_shard)

    @property
    def disk_bytes(self) -> float:
        """Bytes of the work folder and the shards at the end of the run."""
        return self.tokens * (SHARD_BYTES + WORK_BYTES)

    @property
    def memory_bytes(self) -> float:
        """Memory of all ranks together."""
        return self.ranks * RANK_BYTES

    @property
    def index_seconds(self) -> float:
        """Time of the index reads, summed over all ranks."""
        return self.splits * self.windows * INDEX_SECONDS

    @property
    def seconds(self) -> float:
        """Duration with one core per rank. Ranks process whole splits, so the last round counts in full."""
        rounds = math.ceil(self.splits / self.ranks) * self.ranks / self.splits
        return (self.tokens / TOKENS_PER_SECOND * rounds + self.index_seconds) / self.ranks
