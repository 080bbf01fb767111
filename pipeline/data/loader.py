"""Deterministic data loader over packed shards. The order does not depend on the number of ranks."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from data_prep.shards.format import PackedRow
from pipeline.data.micro_batch import MicroBatch, collate, take_part


class RowSource(Protocol):
    """Random-access collection of packed rows, such as `ShardSet`. Its manifest lists the languages."""

    manifest: dict[str, Any]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> PackedRow: ...

    def __iter__(self) -> Iterator[PackedRow]: ...


@dataclass(frozen=True)
class BatchSplit:
    """Division of a global batch into micro-batches.

    P = `sequence_parallel_size` consecutive ranks share their rows. In micro-step m, rank r takes `micro_batch_size`
    rows, starting at row (m * world_size // P + r // P) * micro_batch_size.
    """

    train_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    sequence_parallel_size: int = 1

    @property
    def micro_step_rows(self) -> int:
        """Number of rows of a micro-step, over all ranks."""
        return self.micro_batch_size * (self.world_size // self.sequence_parallel_size)

    @property
    def accumulation_steps(self) -> int:
        """Number of micro-batches per rank and optimizer step."""
        return self.train_batch_size // self.micro_step_rows

    def start(self, micro_step: int) -> int:
        """Return this rank's first row in a micro-step."""
        return micro_step * self.micro_step_rows + self.rank // self.sequence_parallel_size * self.micro_batch_size

    def collate(
        self, rows: list[PackedRow], languages: list[str], pad_token_id: int, token_weights: Tensor | None
    ) -> MicroBatch:
        """Collate rows, and take this rank's part if it shares them with other ranks. See `collate`."""
        parts = self.sequence_parallel_size
        return take_part(collate(rows, languages, pad_token_id, token_weights, parts), self.rank % parts, parts)


class Loader:
    """Endless stream of global batches over shuffled epochs.

    Row n of the stream is row n % len(rows) of epoch n // len(rows). The order of an epoch depends only on the seed,
    so the global batches are the same for any number of ranks. A thread prefetches the next batch.

    Attributes:
        consumed: number of rows returned so far, over all ranks.
    """

    def __init__(
        self,
        rows: RowSource,
        split: BatchSplit,
        seed: int,
        pad_token_id: int,
        token_weights: Tensor | None = None,
        row_weights: np.ndarray | None = None,
    ) -> None:
        self.rows, self.split, self.seed, self.pad_token_id = rows, split, seed, pad_token_id
        self.token_weights, self.row_weights = token_weights, row_weights
        self.languages: list[str] = rows.manifest["languages"]
        self.consumed = 0
        self._epoch_orders: dict[int, np.ndarray] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._prefetched: Future[list[MicroBatch]] | None = None

    def state_dict(self) -> dict[str, int]:
        """Return the position in the stream. It does not depend on the number of ranks."""
        return {"consumed": self.consumed, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from a position that `state_dict` returned."""
        self.consumed, self.seed, self._prefetched = state["consumed"], state["seed"], None
        self._epoch_orders.clear()

    def next(self) -> list[MicroBatch]:
        """Return this rank's micro-batches of the next global batch."""
        micro_batches = self._prefetched.result() if self._prefetched else self._read(self.consumed)
        self.consumed += self.split.train_batch_size
        self._prefetched = self._thread.submit(self._read, self.consumed)
        return micro_batches

    def put_back(self) -> None:
        """Put the last global batch back into the stream, because it was not trained on."""
        self.consumed, self._prefetched = self.consumed - self.split.train_batch_size, None

    def _read(self, first: int) -> list[MicroBatch]:
        split, size = self.split, self.split.micro_batch_size
        micro_batches = []
        for micro_step in range(split.accumulation_steps):
            start = first + split.start(micro_step)
            rows = [self.rows[self._row_index(n)] for n in range(start, start + size)]
            micro_batches.append(split.collate(rows, self.languages, self.pad_token_id, self.token_weights))
        return micro_batches

    def _row_index(self, n: int) -> int:
        epoch, index = divmod(n, len(self.rows))
        if epoch not in self._epoch_orders:
            self._epoch_orders = {e: order for e, order in self._epoch_orders.items() if e == epoch - 1}
            self._epoch_orders[epoch] = epoch_order(len(self.rows), self.row_weights, self.seed, epoch)
        return int(self._epoch_orders[epoch][index])


def epoch_order(num_rows: int, weights: np.ndarray | None, seed: int, epoch: int) -> np.ndarray:
    """Return the shuffled row indices of an epoch, [num_rows] int64.

    With weights (systematic sampling), row i occurs num_rows * w_i / sum(w) times, rounded up or down.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(num_rows)
    if weights is None:
        return order
    ends = np.cumsum(weights[order]) / weights.sum() * num_rows
    # Systematic sampling makes one draw in each unit interval, always at the same offset.
    draws = np.searchsorted(ends, np.arange(num_rows) + generator.random()).clip(0, num_rows - 1)
    return order[generator.permutation(draws)]


def row_weights(rows: RowSource, language_weights: dict[str, float]) -> np.ndarray | None:
    """Return the sampling weight of each row, [num_rows], or None if no language has a weight.

    The weight of a row is the mean language weight over its tokens. A language without a weight has weight 1.
    """
    if not language_weights:
        return None
    return np.array(
        [np.average([language_weights.get(lang, 1.0) for lang in row.lang], weights=row.seq_lens) for row in rows]
    )
