"""Packed shards to micro-batches, in an order that does not depend on the number of ranks.

Shape letters: B rows of a micro-batch, N tokens of its longest row, T supervised positions, S sequences.
"""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_prep.errors import UserError
from data_prep.shards import IGNORE, PIVOT, PackedRow, ShardSet
from pipeline.loss import Supervised, Totals


@dataclass(frozen=True)
class MicroBatch:
    """What one rank feeds to one forward pass.

    Attributes:
        input_ids, position_ids: [B, N] int64; positions restart in every sequence, which isolates them in attention.
        positions: [T] int64, the flat places in [B, N] whose hidden states predict a supervised token.
        supervised: the layout of those positions.
        num_tokens: real tokens, without padding.
        pair_ids: of its rows' sequences, for messages.
    """

    input_ids: Tensor
    position_ids: Tensor
    positions: Tensor
    supervised: Supervised
    num_tokens: int
    pair_ids: list[str]

    def to(self, device: torch.device) -> "MicroBatch":
        """The same with what the model reads on a device; the loss wants its layout on the host."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
        )


def collate(
    rows: list[PackedRow], languages: list[str], pad_token_id: int, token_weights: Tensor | None = None
) -> MicroBatch:
    """Stack rows; padding is a sequence of its own, so nothing attends to it. `token_weights` [V] by target id."""
    width = max(len(row.input_ids) for row in rows)
    input_ids = np.full((len(rows), width), pad_token_id, np.int64)
    position_ids = np.tile(np.arange(width), (len(rows), 1))
    positions, targets, lengths, pivots, problems, tongues = [], [], [], [], [], []
    for b, row in enumerate(rows):
        size = len(row.input_ids)
        input_ids[b, :size] = row.input_ids
        position_ids[b, size:] -= size
        starts = np.cumsum(row.seq_lens) - row.seq_lens
        position_ids[b, :size] -= np.repeat(starts, row.seq_lens)
        # Position t predicts token t + 1 of its own sequence; a sequence's first token is never supervised.
        places = np.flatnonzero(row.labels != IGNORE)
        positions.append(b * width + places - 1)
        targets.append(row.labels[places])
        lengths.append(np.bincount(np.repeat(np.arange(len(starts)), row.seq_lens)[places], minlength=len(starts)))
        is_pivot = np.array([role == PIVOT for role in row.role])
        first = sum(len(n) for n in lengths[:-1])
        pivots.append(first + np.maximum.accumulate(np.where(is_pivot, np.arange(len(is_pivot)), 0)))
        problems += [problem_number(pair_id) for pair_id in row.pair_id]
        tongues += [languages.index(lang) for lang in row.lang]
    target_ids = torch.from_numpy(np.concatenate(targets).astype(np.int64))
    supervised = Supervised(
        targets=target_ids,
        lengths=torch.from_numpy(np.concatenate(lengths).astype(np.int64)),
        pivot=torch.from_numpy(np.concatenate(pivots).astype(np.int64)),
        problem=torch.tensor(problems, dtype=torch.int64),
        language=torch.tensor(tongues, dtype=torch.int64),
        token_weights=None if token_weights is None else token_weights[target_ids],
    )
    return MicroBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        supervised,
        sum(len(row.input_ids) for row in rows),
        sorted({pair_id for row in rows for pair_id in row.pair_id}),
    )


def problem_number(pair_id: str) -> int:
    """The same 63-bit number for a pair_id on every rank."""
    return int.from_bytes(hashlib.blake2b(pair_id.encode(), digest_size=8).digest(), "big") >> 1


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
        shards: ShardSet,
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


def row_weights(shards: ShardSet, language_weights: dict[str, float]) -> np.ndarray | None:
    """[rows] mean weight of each row's tokens by language (1 where none is given); None without weights."""
    if not language_weights:
        return None
    return np.array(
        [np.average([language_weights.get(lang, 1.0) for lang in row.lang], weights=row.seq_lens) for row in shards]
    )


def local_totals(window: list[MicroBatch]) -> Totals:
    """Supervised positions and pairs of this rank's share of a global batch."""
    parts = [micro.supervised.totals() for micro in window]
    return Totals(sum(part.tokens for part in parts), sum(part.pairs for part in parts))


def load_token_table(path: str | None, vocab_size: int, key: str) -> Tensor | None:
    """[V] fp32 `weights` of a safetensors file, for the setting `key`.

    Raises:
        UserError: unreadable, another shape, negative or not finite.
    """
    if path is None:
        return None
    try:
        weights = load_file(path)["weights"].float()
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{path}: {key} needs a safetensors file with a tensor 'weights' ({error})") from error
    if weights.shape != (vocab_size,):
        raise UserError(f"{path}: {key} has shape {tuple(weights.shape)}, the vocabulary has {vocab_size} entries")
    if not bool((weights >= 0).all()) or not bool(weights.isfinite().all()):
        raise UserError(f"{path}: {key} must be finite and not negative")
    return weights
