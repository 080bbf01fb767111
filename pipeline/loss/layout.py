"""Exchange of the layout of the target tokens of all ranks. It depends on the data only.

The layouts of all micro-batches of an optimizer step are exchanged in one all-gather before the first micro-batch, so
the host waits for the device only once per optimizer step. The tables of the sequences are copied to the host, where
the work is planned. The target tokens stay on the device.

Shape letters: M micro-batches, R ranks, T target tokens of this rank, A of all ranks, S sequences of all ranks.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .comm import Group, all_gather, rank_and_size
from .indexing import bounds, ranges, upload
from .loss_batch import LossBatch

FIELDS = 5  # integers of a sequence in the message of a rank


@dataclass(frozen=True)
class GlobalLayout:
    """Layout of the target tokens of all ranks. Equal on all ranks.

    Sequences are ordered by rank after the exchange, and in chunk order after `in_order`. If ranks share rows, each of
    them has a part of each sequence of these rows, which is an entry of its own.

    Attributes:
        sequence_counts: [R] number of sequences of each rank, on the host.
        lengths, pivot, problem_id, language: [S], as in `LossBatch`, on the host. The pivot is an index into S.
        ce_weights: [S] float64 weight of the sequence in the cross entropy, on the host.
        values: int64, on the device. The target ids of each rank, followed by its pooling weights if `weight_starts` is
            not None (the bits of float64 numbers).
        target_starts: [R] index in `values` of each rank's first target id, on the host.
        weight_starts: [R] index in `values` of each rank's first pooling weight, on the host; None if the pooling
            weights follow from the lengths.
        whole_lengths: [S] number of target tokens of all parts of the sequence, on the host.
        first_part: [S] index of the first part of the same sequence, on the host; None if no rows are shared.
    """

    sequence_counts: Tensor
    lengths: Tensor
    pivot: Tensor
    problem_id: Tensor
    language: Tensor
    ce_weights: Tensor
    values: Tensor
    target_starts: Tensor
    weight_starts: Tensor | None
    whole_lengths: Tensor
    first_part: Tensor | None

    @property
    def longest_parts(self) -> Tensor | None:
        """[S] length of the longest part of the same sequence, or None if no rows are shared."""
        if self.first_part is None:
            return None
        return self.lengths.scatter_reduce(0, self.first_part, self.lengths, "amax")[self.first_part]

    def in_order(self, order: Tensor) -> "GlobalLayout":
        """Return the layout with its sequences in another order. `order` [S] holds their present indices."""
        new = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))

        def ordered(field: Tensor) -> Tensor:
            return field.index_select(0, order)  # on the host three times as fast as field[order]

        return replace(
            self,
            lengths=ordered(self.lengths),
            pivot=new.index_select(0, ordered(self.pivot)),
            problem_id=ordered(self.problem_id),
            language=ordered(self.language),
            ce_weights=ordered(self.ce_weights),
            whole_lengths=ordered(self.whole_lengths),
            first_part=None if self.first_part is None else new.index_select(0, ordered(self.first_part)),
        )


class LayoutExchange:
    """All-gather of the layouts of an optimizer step, in messages of the same size on all ranks.

    A message consists of three parts: R counts for each micro-batch (see `exchange`), the table of the sequences, and
    the target tokens. If the data of a rank does not fit, the capacity is increased on all ranks and the exchange
    repeated. This happens a few times at the beginning of a run.

    Args:
        group: process group that shards the vocabulary, or None for a single process; see `solar_loss`.

    Attributes:
        capacity: [2] room for the table and for the target tokens, equal on all ranks.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank, self.size = rank_and_size(group)
        self.capacity = torch.zeros(2, dtype=torch.int64)

    def exchange(
        self, batches: list[LossBatch], pooling: str, device: torch.device, counts: Tensor | None = None
    ) -> tuple[list[GlobalLayout], Tensor]:
        """Exchange the layouts of M micro-batches. Collective: all ranks must call it, with the same M.

        Args:
            batches: layouts of this rank. If ranks share rows, all have the same number of parts.
            pooling: `mean`, `last` or `weights`.
            device: device of the collective.
            counts: [M, R] int64, one number for each rank, on the host; None for zeros.

        Returns:
            The layouts of all ranks, and [M, R] int64 on the host: the numbers of all ranks for this rank.

        Raises:
            ValueError: `pooling` is `weights` and a batch has no token weights.
        """
        batches = [batch.to("cpu") for batch in batches]
        if counts is None:
            counts = torch.zeros(len(batches), self.size, dtype=torch.int64)
        parts = batches[0].part.count if batches and batches[0].part is not None else 1
        # A part of a sequence does not show whether it has the last token.
        by_token = pooling == "weights" or (pooling == "last" and parts > 1)
        header, table, tokens = message_parts(batches, pooling, by_token)
        if self.size == 1:
            tables = torch.cat([header, table])
            (values,) = upload([torch.cat([tables, tokens])], device)
            return _layouts(tables[None], values, header[0], len(values), len(batches), by_token, parts), counts
        self.capacity = torch.maximum(self.capacity, torch.tensor([len(header), 0]))
        while True:
            message = pad_message(counts, torch.cat([header, table]), tokens, self.capacity.tolist())
            gathered = all_gather(upload([message], device)[0], self.group)
            first = counts.numel()
            received = gathered[:, self.rank : first : self.size]
            on_host = torch.cat([received, gathered[:, first : first + int(self.capacity[0])]], dim=1).cpu()
            needed = on_host[:, len(batches) : len(batches) + 2].amax(0)
            if (needed <= self.capacity).all():
                break
            # Some room for growth, so that the capacity rarely changes.
            self.capacity = torch.maximum(self.capacity, needed + needed // 4)
        tables, offset = on_host[:, len(batches) :], first + self.capacity[0]
        layouts = _layouts(tables, gathered.flatten(), offset, gathered.shape[1], len(batches), by_token, parts)
        return layouts, on_host[:, : len(batches)].T.contiguous()


def pad_message(counts: Tensor, table: Tensor, tokens: Tensor, capacity: list[int]) -> Tensor:
    """Concatenate the parts of a message, with table and target tokens cut or padded to their capacity."""
    parts = zip((table, tokens), capacity, strict=True)
    padded = [torch.nn.functional.pad(part[:size], (0, max(0, size - len(part)))) for part, size in parts]
    return torch.cat([counts.flatten(), *padded])


def message_parts(batches: list[LossBatch], pooling: str, by_token: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return header, table and target tokens of this rank as int64.

    The header holds the length of header and table, the length of the target tokens, and then the number of target
    tokens and of sequences of each batch.
    """
    tables, tokens = [], []
    for batch in batches:
        ce = torch.ones(len(batch.lengths)) if batch.ce_weights is None else batch.ce_weights
        fields = [batch.lengths, batch.pivot, batch.problem_id, batch.language, ce.double().view(torch.int64)]
        tables.append(torch.stack(fields, dim=1).flatten())
        tokens.append(batch.targets)
        if by_token:
            tokens.append(batch.pooling_weights(pooling, torch.float64).view(torch.int64))
    table, values = torch.cat(tables), torch.cat(tokens)
    sizes = [size for batch in batches for size in (len(batch.targets), len(batch.lengths))]
    return torch.tensor([2 + len(sizes) + len(table), len(values), *sizes]), table, values


def _layouts(
    tables: Tensor, values: Tensor, offset: Tensor, stride: int, count: int, by_token: bool, parts: int
) -> list[GlobalLayout]:
    """Build the layouts of `count` micro-batches from the messages of all ranks.

    Args:
        tables: [R, ...] header and table of each rank, on the host.
        values: the messages on the device, flattened.
        offset: index of the target tokens in a message.
        stride: length of a message.
        by_token: whether the target tokens are followed by their pooling weights.
        parts: number of consecutive ranks that share their rows.
    """
    header = 2 + 2 * count
    sizes = tables[:, 2:header].view(len(tables), count, 2)
    room = (tables.shape[1] - header) // FIELDS  # sequences of a rank for which the message has room
    fields = tables[:, header : header + room * FIELDS].reshape(len(tables) * room, FIELDS).unbind(1)
    table_starts = torch.arange(len(tables)) * room
    token_starts = torch.arange(len(tables)) * stride + offset
    result = []
    for tokens, sequences in sizes.permute(1, 2, 0).unbind(0):
        index = ranges(table_starts, sequences)
        lengths, pivot, problem_id, language, ce_weights = (field.index_select(0, index) for field in fields)
        pivot = pivot + torch.repeat_interleave(bounds(sequences)[:-1], sequences)
        first_part, whole_lengths = None, lengths
        if parts > 1:
            rank = torch.repeat_interleave(torch.arange(len(sequences)), sequences)
            first_part = torch.arange(len(lengths)) - rank % parts * sequences[rank]
            whole_lengths = torch.zeros_like(lengths).index_add_(0, first_part, lengths)[first_part]
        result.append(
            GlobalLayout(
                sequence_counts=sequences,
                lengths=lengths,
                pivot=pivot,
                problem_id=problem_id,
                language=language,
                ce_weights=ce_weights.view(torch.float64),
                values=values,
                target_starts=token_starts,
                weight_starts=token_starts + tokens if by_token else None,
                whole_lengths=whole_lengths,
                first_part=first_part,
            )
        )
        table_starts = table_starts + sequences
        token_starts = token_starts + tokens * (2 if by_token else 1)
    return result
