"""Select the target tokens of each subchunk and copy them to the device."""

import torch

from pipeline.loss.alignment import PooledRepresentations
from pipeline.loss.chunking import Chunk
from pipeline.loss.kernels import SubchunkTokens
from pipeline.loss.layout import GlobalLayout, upload


def subchunk_tokens(
    layout: GlobalLayout, chunks: list[Chunk], table: PooledRepresentations, rank: int | None, device: torch.device
) -> list[list[tuple[slice, SubchunkTokens]]]:
    """Return, for each chunk, the target tokens of its subchunks and their slices in the layout.

    All tensors are copied to the device at once.

    Args:
        layout: layout of all ranks, in chunk order.
        chunks: the chunks of the micro-step.
        table: pooled representations, which record the sequences that require a gradient.
        rank: if given, return only the target tokens of this rank. Sequence and gradient indices are then relative to
            its first sequence.
        device: device for the result.
    """
    first, grad_index = torch.zeros_like(layout.lengths), table.grad_index.clone()
    sequences = []
    for chunk, requires_grad_of_rank in zip(chunks, table.requires_grad_of_rank, strict=True):
        selected = chunk.sequences if rank is None else chunk.sequences_of_rank(rank)
        before = 0 if rank is None else sum(requires_grad_of_rank[:rank])
        first[selected] = selected.start
        grad_index[selected] = torch.where(grad_index[selected] < 0, -1, grad_index[selected] - before)
        sequences.append(selected)
    integers = [layout.targets, layout.sequence - first[layout.sequence], grad_index[layout.sequence]]
    targets, sequence, grad_index_of_token = upload(integers, device)
    pooling, ce = upload([layout.pooling_weights, layout.ce_weights], device)
    grad_index_of_sequence = grad_index.tolist()

    result: list[list[tuple[slice, SubchunkTokens]]] = []
    for chunk, selected in zip(chunks, sequences, strict=True):
        result.append([])
        for subchunk in chunk.subchunks:
            at, spans = subchunk.tokens, subchunk.spans
            if rank is not None:
                at, spans = subchunk.of_rank(rank, selected.start - chunk.first)
            tokens = SubchunkTokens(
                targets[at],
                pooling[at],
                ce[at],
                bool((layout.ce_weights[at] == 0).any()),
                sequence[at],
                grad_index_of_token[at],
                spans,
                grad_index_of_sequence[selected],
            )
            result[-1].append((at, tokens))
    return result
