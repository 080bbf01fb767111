"""Packed shards to micro-batches, in an order that does not depend on the number of ranks.

Shape letters: B rows of a micro-batch, N tokens of its longest row, T supervised positions, S sequences.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from data_prep.shards.format import PackedRow
from pipeline.data.micro_batch import MicroBatch, collate


class RowSource(Protocol):
    """A random-access collection of packed rows, such as `ShardSet`; its manifest lists the languages."""

    manifest: dict[str, Any]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> PackedRow: ...

    def __iter__(self) -> Iterator[PackedRow]: ...


@dataclass(frozen=True)
class Batches:
    """How a global batch of rows is dealt out: micro-step m, rank r takes rows (m * ranks + r) * micro onwards."""

    train_batch_size: int
    micro: int
    rank: int
    ranks: int

    @property
    def accumulation_steps(self) -> int:
        return self.train_batch_size // (self.micro * self.ranks)


class Loader:
    """An endless stream of global batches over shuffled epochs; its state is {epoch, consumed, seed}.

    Row n of the stream is row n % len of epoch n // len, whose order depends on the seed alone, so any number of
    ranks sees the same global batches. The next one is read in the background.
    """

    def __init__(
        self,
        shards: RowSource,
        batches: Batches,
        seed: int,
        pad_token_id: int,
        token_weights: Tensor | None = None,
        row_weights: np.ndarray | None = None,
    ) -> None:
        self.shards, self.batches, self.seed, self.pad_token_id = shards, batches, seed, pad_token_id
        self.token_weights, self.row_weights = token_weights, row_weights
        self.languages: list[str] = shards.manifest["languages"]
        self.consumed = 0
        self._orders: dict[int, np.ndarray] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: Future[list[MicroBatch]] | None = None

    def state(self) -> dict[str, int]:
        return {"epoch": self.consumed // len(self.shards), "consumed": self.consumed, "seed": self.seed}

    def load_state(self, state: dict[str, int]) -> None:
        self.consumed, self.seed, self._ahead = state["consumed"], state["seed"], None
        self._orders.clear()

    def next(self) -> list[MicroBatch]:
        """This rank's micro-batches of the next global batch."""
        window = self._ahead.result() if self._ahead else self._read(self.consumed)
        self.consumed += self.batches.train_batch_size
        self._ahead = self._thread.submit(self._read, self.consumed)
        return window

    def _read(self, first: int) -> list[MicroBatch]:
        b = self.batches
        window = []
        for m in range(b.accumulation_steps):
            begin = first + (m * b.ranks + b.rank) * b.micro
            rows = [self.shards[self._row(n)] for n in range(begin, begin + b.micro)]
            window.append(collate(rows, self.languages, self.pad_token_id, self.token_weights))
        return window

    def _row(self, n: int) -> int:
        epoch, place = divmod(n, len(self.shards))
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = epoch_order(len(self.shards), self.row_weights, self.seed, epoch)
        return int(self._orders[epoch][place])


def epoch_order(rows: int, weights: np.ndarray | None, seed: int, epoch: int) -> np.ndarray:
    """[rows] row numbers of an epoch, shuffled; by weights, row i comes floor or ceil of rows * w_i / sum(w) times."""
    generator = np.random.default_rng([seed, epoch])
    if weights is None:
        return generator.permutation(rows)
    order = generator.permutation(rows)
    ends = np.cumsum(weights[order]) / weights.sum() * rows
    # Systematic sampling: one draw in each unit interval, all with the same offset.
    return order[generator.permutation(np.searchsorted(ends, np.arange(rows) + generator.random()).clip(0, rows - 1))]


def row_weights(shards: RowSource, language_weights: dict[str, float]) -> np.ndarray | None:
    """[rows] mean weight of each row's tokens by language (1 where none is given); None without weights."""
    if not language_weights:
        return None
    return np.array(
        [np.average([language_weights.get(lang, 1.0) for lang in row.lang], weights=row.seq_lens) for row in shards]
    )
