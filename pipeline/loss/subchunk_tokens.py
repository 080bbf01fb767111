"""Build the tables of the target tokens on the device, in chunk order.

Only tables with an entry per sequence or per rank are copied to the device, in two transfers. The device expands them.

Shape letters: A target tokens of all ranks, S sequences of all ranks, P parts of sequences that are in one subchunk
each, R ranks, L languages.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .alignment import PooledRepresentations
from .chunking import Chunk
from .indexing import ranges, upload
from .kernels import SubchunkTokens
from .layout import GlobalLayout


@dataclass(frozen=True)
class TokenTables:
    """Target tokens of all ranks on the device, in chunk order: [A] each, if not stated otherwise.

    Attributes:
        targets: target id.
        sequence: index of the sequence in chunk order.
        pooling_weights: weight in the pooled representation.
        ce_weights: weight in the cross entropy.
        grad_index: index of the sequence among those of its chunk that require a gradient, or -1.
        part_sequence, part_lengths: [P] index of the sequence in chunk order, and number of consecutive target tokens.
        any_without_ce: whether any weight in the cross entropy is 0, on the host.
    """

    targets: Tensor
    sequence: Tensor
    pooling_weights: Tensor
    ce_weights: Tensor
    grad_index: Tensor
    part_sequence: Tensor
    part_lengths: Tensor
    any_without_ce: bool

    def sum_by_language(self, values: list[Tensor], language: Tensor, languages: int) -> Tensor:
        """Sum values by language, in a fixed order and without an [L, A] tensor.

        Args:
            values: n tensors [A].
            language: [S] language of each sequence in chunk order.
            languages: L.

        Returns:
            [n, L] sums.
        """
        if len(self.targets) == 0:
            return values[0].new_zeros(len(values), languages)
        # The lengths are valid; checking them would wait for the device. A GPU is slow at segments of [A, n] tensors.
        parts = [torch.segment_reduce(v, "sum", lengths=self.part_lengths, unsafe=True, initial=0) for v in values]
        own = language[self.part_sequence] == torch.arange(languages, device=language.device)[:, None]
        return torch.where(own, torch.stack(parts)[:, None], 0).sum(2)


def token_tables(
    layout: GlobalLayout, chunks: list[Chunk], table: PooledRepresentations, pooling: str, dtype: torch.dtype
) -> TokenTables:
    """Build the tables.

    Args:
        layout: layout of all ranks, in chunk order.
        chunks: the chunks of the micro-step.
        table: pooled representations, which record the sequences that require a gradient.
        pooling: `mean`, `last` or `weights`.
        dtype: dtype of the weights.
    """
    subchunks = [subchunk for chunk in chunks for subchunk in chunk.subchunks]
    numbers = [torch.arange(c.first, c.sequences.stop) for c in chunks for _ in c.subchunks]
    nothing = torch.zeros(0, dtype=torch.int64)
    starts = torch.cat([nothing, *(s.starts + layout.target_starts for s in subchunks)])
    counts = torch.cat([nothing, *(s.counts for s in subchunks)])
    repeats = torch.cat([nothing, *(s.edges.diff() for s in subchunks)])
    skipped = torch.cat([nothing, *(s.skipped for s in subchunks)])
    to_weights = nothing if layout.weight_starts is None else layout.weight_starts - layout.target_starts
    total, device = int(counts.sum()), layout.values.device
    integers = [starts, counts, torch.cat([nothing, *numbers]), repeats, skipped, to_weights, table.grad_index_of_all]
    starts, counts, part_sequence, part_lengths, skipped, to_weights, grad_index = upload(integers, device)
    (ce_weights,) = upload([layout.ce_weights.to(dtype)], device)

    sequence = torch.repeat_interleave(part_sequence, part_lengths, output_size=total)
    lengths = table.lengths[sequence]
    if layout.weight_starts is not None:
        places = ranges(starts + to_weights.repeat(len(subchunks)), counts, total)
        weights = layout.values.view(torch.float64)[places].to(dtype)
    elif pooling == "mean":
        weights = 1.0 / lengths.to(dtype)
    else:
        weights = (ranges(skipped, part_lengths, total) == lengths - 1).to(dtype)
    return TokenTables(
        targets=layout.values[ranges(starts, counts, total)],
        sequence=sequence,
        pooling_weights=weights,
        ce_weights=ce_weights[sequence],
        grad_index=grad_index[sequence],
        part_sequence=part_sequence,
        part_lengths=part_lengths,
        any_without_ce=bool((layout.ce_weights == 0).any()),
    )


def subchunk_tokens(
    tables: TokenTables, chunks: list[Chunk], table: PooledRepresentations, rank: int | None
) -> list[list[tuple[slice, SubchunkTokens]]]:
    """Return, for each chunk, the target tokens of its subchunks and their slices in chunk order.

    Args:
        tables: the tables of all target tokens.
        chunks: the chunks of the micro-step.
        table: pooled representations, which record the sequences that require a gradient.
        rank: if given, return only the target tokens of this rank. Sequence and gradient indices are then relative to
            its first sequence.
    """
    result: list[list[tuple[slice, SubchunkTokens]]] = []
    for chunk, with_grad in zip(chunks, table.requires_grad_of_rank, strict=True):
        sequences = chunk.sequences if rank is None else chunk.sequences_of_rank(rank)
        first_with_grad = 0 if rank is None else int(with_grad[:rank].sum())
        grad_index_of_sequence = table.grad_index_of_all[sequences]
        inside = slice(sequences.start - chunk.first, sequences.stop - chunk.first + 1)
        result.append([])
        for subchunk in chunk.subchunks:
            edges = subchunk.edges[inside]
            at = slice(subchunk.start + int(edges[0]), subchunk.start + int(edges[-1]))
            grad_index = tables.grad_index[at]
            tokens = SubchunkTokens(
                tables.targets[at],
                tables.pooling_weights[at],
                tables.ce_weights[at],
                tables.any_without_ce,
                tables.sequence[at] - sequences.start,
                grad_index if first_with_grad == 0 else torch.where(grad_index < 0, -1, grad_index - first_with_grad),
                edges - edges[0],
                torch.where(grad_index_of_sequence < 0, -1, grad_index_of_sequence - first_with_grad),
            )
            result[-1].append((at, tokens))
    return result
