"""Collate packed rows into micro-batches.

Shape letters: B rows of a micro-batch, N tokens in its longest row, T target tokens, S sequences.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data_prep.shards.format import IGNORE, PIVOT, PackedRow
from pipeline.loss import DistinctIds, LookupRoute, LossBatch, LossNormalizers
from pipeline.loss.indexing import upload


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward pass on one rank.

    If ranks share rows, all fields describe this rank's tokens (see `take_part`), except for `seq_lens`, `cu_seq_lens`
    and `pair_ids`.

    Attributes:
        input_ids: [B, N] int64 token ids.
        position_ids: [B, N] int64. Positions restart at 0 in every sequence, so sequences do not attend to each other.
            Those of padding are 0, because some models choose their rotary frequencies by the largest position.
        positions: [T] int64 indices into the flattened [B, N]. The hidden state at each predicts a target token.
        seq_lens: length of each sequence of the flattened [B, N], on the host. The padding of a row is a sequence.
        cu_seq_lens: [number of sequences + 1] int32 cumulative sum of `seq_lens`, starting with 0.
        loss_batch: layout of the target tokens, with their sequences and pairs.
        num_tokens: number of tokens without padding. The first of the ranks that share rows counts those of all.
        pair_ids: sorted pair ids of the rows, for error messages.
        distinct_ids: the distinct values of `input_ids`, on the host.
        route: which rank requests which of `distinct_ids` from which, if the ranks have exchanged this; otherwise None.
    """

    input_ids: Tensor
    position_ids: Tensor
    positions: Tensor
    seq_lens: list[int]
    cu_seq_lens: Tensor
    loss_batch: LossBatch
    num_tokens: int
    pair_ids: list[str]
    distinct_ids: DistinctIds
    route: LookupRoute | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """Return a copy with the model inputs on `device`. The loss batch stays on the host, where it is read."""
        tensors = [self.input_ids, self.position_ids, self.positions]
        distinct = [] if self.route is None else self.route.distinct.tensors()
        input_ids, position_ids, positions, *distinct = upload([*tensors, *distinct], device)
        return replace(
            self,
            input_ids=input_ids,
            position_ids=position_ids,
            positions=positions,
            cu_seq_lens=upload([self.cu_seq_lens], device)[0],
            route=None if self.route is None else replace(self.route, distinct=DistinctIds(*distinct)),
        )


def collate(
    rows: list[PackedRow],
    languages: list[str],
    pad_token_id: int,
    token_weights: Tensor | None = None,
    width_multiple: int = 1,
) -> MicroBatch:
    """Pad and stack packed rows.

    Padding is treated as a separate sequence, so no other sequence attends to it. A group is one problem in several
    languages. Its sequences are consecutive in the row and the pivot comes first, so the pivot of a sequence is the
    nearest pivot-language sequence at or before it. The pivot of a split group is in several rows; the weights of its
    copies in the cross entropy sum to 1.

    Args:
        rows: B packed rows.
        languages: all languages of the run; a language's id is its index in this list.
        pad_token_id: token id used to pad rows to the longest one.
        token_weights: [V] pooling weights by token id, or None.
        width_multiple: pad rows to a multiple of this.
    """
    width = max(len(row.input_ids) for row in rows)
    width += -width % width_multiple
    input_ids, position_ids, seq_lens = _pad_and_stack(rows, width, pad_token_id)
    positions, loss_batch = _lay_out_targets(rows, width, languages, token_weights)
    return MicroBatch(
        input_ids,
        position_ids,
        positions,
        seq_lens,
        torch.from_numpy(np.cumsum([0, *seq_lens]).astype(np.int32)),
        loss_batch,
        sum(len(row.input_ids) for row in rows),
        sorted({pair_id for row in rows for pair_id in row.pair_id}),
        DistinctIds.of(input_ids),
    )


def _pad_and_stack(rows: list[PackedRow], width: int, pad_token_id: int) -> tuple[Tensor, Tensor, list[int]]:
    """Return input_ids and position_ids, both [B, width] int64, and the lengths of the sequences."""
    input_ids = np.full((len(rows), width), pad_token_id, np.int64)
    position_ids = np.tile(np.arange(width), (len(rows), 1))
    seq_lens: list[int] = []
    for b, row in enumerate(rows):
        size = len(row.input_ids)
        input_ids[b, :size] = row.input_ids
        position_ids[b, size:] = 0
        position_ids[b, :size] -= np.repeat(np.cumsum(row.seq_lens) - row.seq_lens, row.seq_lens)
        seq_lens += [*row.seq_lens.tolist(), *([width - size] if size < width else [])]
    return torch.from_numpy(input_ids), torch.from_numpy(position_ids), seq_lens


def _lay_out_targets(
    rows: list[PackedRow], width: int, languages: list[str], token_weights: Tensor | None
) -> tuple[Tensor, LossBatch]:
    """Return the positions that predict the target tokens, [T] int64 indices into [B, width], and the loss batch."""
    positions, targets, lengths, pivots, problem_ids, language_ids = [], [], [], [], [], []
    first = 0  # index of the row's first sequence
    for b, row in enumerate(rows):
        # Position t predicts token t + 1 of its sequence. The first token of a sequence is never a target.
        target_at = np.flatnonzero(row.labels != IGNORE)
        positions.append(b * width + target_at - 1)
        targets.append(row.labels[target_at])
        count = len(row.seq_lens)
        lengths.append(np.bincount(np.repeat(np.arange(count), row.seq_lens)[target_at], minlength=count))
        is_pivot = np.array([role == PIVOT for role in row.role])
        pivots.append(first + np.maximum.accumulate(np.where(is_pivot, np.arange(count), 0)))
        problem_ids += [problem_number(pair_id) for pair_id in row.pair_id]
        language_ids += [languages.index(lang) for lang in row.lang]
        first += count
    copies = [np.ones(len(row.seq_lens)) if row.copies is None else row.copies for row in rows]
    target_ids = torch.from_numpy(np.concatenate(targets).astype(np.int64))
    loss_batch = LossBatch(
        targets=target_ids,
        lengths=torch.from_numpy(np.concatenate(lengths).astype(np.int64)),
        pivot=torch.from_numpy(np.concatenate(pivots).astype(np.int64)),
        problem_id=torch.tensor(problem_ids, dtype=torch.int64),
        language=torch.tensor(language_ids, dtype=torch.int64),
        token_weights=None if token_weights is None else token_weights[target_ids],
        ce_weights=None if all(row.copies is None for row in rows) else torch.from_numpy(1 / np.concatenate(copies)),
    )
    return torch.from_numpy(np.concatenate(positions).astype(np.int64)), loss_batch


def take_part(batch: MicroBatch, index: int, count: int) -> MicroBatch:
    """Return the tokens of rank `index` of `count` ranks that share the rows: token `index` and every `count`-th after.

    A position and the target token that it predicts may be on different ranks, so targets are found in the whole rows.

    Args:
        batch: the whole rows, whose width is a multiple of `count`.
    """
    if count == 1:
        return batch
    targets = (batch.positions % count == index).nonzero().squeeze(1)
    input_ids, position_ids = (x[:, index::count].contiguous() for x in (batch.input_ids, batch.position_ids))
    return replace(
        batch,
        input_ids=input_ids,
        position_ids=position_ids,
        positions=batch.positions[targets] // count,
        loss_batch=batch.loss_batch.take_part(targets, index, count),
        num_tokens=batch.num_tokens if index == 0 else 0,  # counted once
        distinct_ids=DistinctIds.of(input_ids),
    )


def problem_number(pair_id: str) -> int:
    """Hash a pair id to a 63-bit integer. The hash is the same on all ranks."""
    return int.from_bytes(hashlib.blake2b(pair_id.encode(), digest_size=8).digest(), "big") >> 1


def local_normalizers(micro_batches: list[MicroBatch]) -> LossNormalizers:
    """Count the target tokens and pairs in this rank's part of a global batch."""
    parts = [micro_batch.loss_batch.normalizers() for micro_batch in micro_batches]
    return LossNormalizers(sum(part.tokens for part in parts), sum(part.pairs for part in parts))
