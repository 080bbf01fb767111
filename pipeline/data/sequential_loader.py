"""Data loader that reads packed shards once, in order, for validation."""

import math
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from data_prep.shards.format import IGNORE, PIVOT, PackedRow
from pipeline.data.loader import BatchSplit, RowSource
from pipeline.data.micro_batch import MicroBatch


class SequentialLoader:
    """Iterable over this rank's micro-batches of a data set, each row once.

    Micro-step m has the rows of `BatchSplit`, as far as there are any. All ranks have the same number of micro-steps,
    because all take part in every forward pass. A rank that has no rows left gets a row without target tokens.

    Args:
        rows: packed rows.
        languages: all languages of the run; a language's id is its index in this list.
        split: micro-batch size, rank and number of ranks.
        pad_token_id: token id used to pad rows.
        token_weights: [V] pooling weights by token id, or None.
    """

    def __init__(
        self,
        rows: RowSource,
        languages: list[str],
        split: BatchSplit,
        pad_token_id: int,
        token_weights: Tensor | None = None,
    ) -> None:
        self.rows, self.languages, self.split = rows, languages, split
        self.pad_token_id, self.token_weights = pad_token_id, token_weights

    def __len__(self) -> int:
        """Return the number of micro-steps, equal on all ranks."""
        return math.ceil(len(self.rows) / self.split.micro_step_rows)

    def __iter__(self) -> Iterator[MicroBatch]:
        for micro_step in range(len(self)):
            start = self.split.start(micro_step)
            rows = [self.rows[n] for n in range(start, min(start + self.split.micro_batch_size, len(self.rows)))]
            rows = rows or [self._row_without_targets()]
            yield self.split.collate(rows, self.languages, self.pad_token_id, self.token_weights)

    def _row_without_targets(self) -> PackedRow:
        ids, labels = np.array([self.pad_token_id], np.int32), np.array([IGNORE], np.int32)
        return PackedRow(ids, labels, np.ones(1, np.int32), ["padding"], self.languages[:1], [PIVOT])
