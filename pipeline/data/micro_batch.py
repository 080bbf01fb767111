"""Collate packed rows into micro-batches.

Shape letters: B rows of a micro-batch, N tokens of its longest row, T supervised positions, S sequences.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data_prep.shards.format import IGNORE, PIVOT, PackedRow
from pipeline.loss import LossBatch, LossNormalizers


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
    loss_batch: LossBatch
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
    loss_batch = LossBatch(
        targets=target_ids,
        lengths=torch.from_numpy(np.concatenate(lengths).astype(np.int64)),
        pivot=torch.from_numpy(np.concatenate(pivots).astype(np.int64)),
        problem_id=torch.tensor(problems, dtype=torch.int64),
        language=torch.tensor(tongues, dtype=torch.int64),
        token_weights=None if token_weights is None else token_weights[target_ids],
    )
    return MicroBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        loss_batch,
        sum(len(row.input_ids) for row in rows),
        sorted({pair_id for row in rows for pair_id in row.pair_id}),
    )


def problem_number(pair_id: str) -> int:
    """The same 63-bit number for a pair_id on every rank."""
    return int.from_bytes(hashlib.blake2b(pair_id.encode(), digest_size=8).digest(), "big") >> 1


def local_normalizers(window: list[MicroBatch]) -> LossNormalizers:
    """Supervised positions and pairs of this rank's share of a global batch."""
    parts = [micro.loss_batch.normalizers() for micro in window]
    return LossNormalizers(sum(part.tokens for part in parts), sum(part.pairs for part in parts))
