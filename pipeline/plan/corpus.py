"""Estimate files, disk and time of `python -m data_prep pack` for a number of pairs.

Tokenization, packing and shard writing are cut into independent parts, so their time divides by the number of ranks.
One term grows with the square of the data: each packing window reads the index of each piece.
"""

import math
from dataclasses import dataclass

from data_prep.packing.settings import WINDOW_BYTES, WINDOWS, PackSettings
from data_prep.readers import SPLIT_BYTES, SPLITS

# Measured as described in docs/data.md and docs/scaling.md.
RECORD_BYTES = 724  # a JSON line: a word problem with its chain of thought, mean of ten languages
RECORD_TOKENS = 136  # with a vocabulary of 16k
TOKENS_PER_SECOND = 1.11e6  # of one core, end to end
INDEX_SECONDS = 1.0e-4  # to open the index of an input split and read the entries of a window, from the page cache
SHARD_BYTES = 2.34  # of Parquet per token
WORK_BYTES = 4.0  # of the work folder per token
RANK_BYTES = 480e6  # memory of a rank; it does not depend on the input
PACKING_EFFICIENCY = 0.995


@dataclass(frozen=True)
class PackingRun:
    """A packing run on a number of ranks.

    Attributes:
        sequences_per_group: languages of an example, pivot included.
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
    def pieces(self) -> int:
        """Input splits. The work folder has two files for each, and one for each window and shard."""
        return math.ceil(self.input_bytes / min(max(self.input_bytes / SPLITS, SPLIT_BYTES[0]), SPLIT_BYTES[1]))

    @property
    def windows(self) -> int:
        """Packing windows: parts of the input whose groups are packed together."""
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
        return self.pieces * self.windows * INDEX_SECONDS

    @property
    def seconds(self) -> float:
        """Duration with one core per rank. Ranks process complete pieces, so the last round counts in full."""
        rounds = math.ceil(self.pieces / self.ranks) * self.ranks / self.pieces
        return (self.tokens / TOKENS_PER_SECOND * rounds + self.index_seconds) / self.ranks
