"""Hidden states and soft tokens of written-out answers, pooled over each response.

Shape letters: B sequences of a batch, N its longest, T response positions, V vocabulary, d hidden size.

The response positions are training's: those at which a response token is predicted, so that the first is the last
token of the prompt. Only pooled states are kept, and probabilities exist for a few positions at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.records import Record
from data_prep.tokenization.chat_template import ChatEncoder
from pipeline.common.errors import UserError
from pipeline.loss.soft_tokens import head_logits, mean_soft_tokens
from pipeline.models.families import HeadConfig, head_config

CHUNK_ELEMENTS = 1 << 26  # logits held at once: [chunk, V] in float32 is 256 MB

Model = Any  # transformers' annotations do not tell that a causal LM has a decoder
FINAL, SOFT = "final", "soft_tokens"


def layer_name(layer: int) -> str:
    """`layer_0` is the input embeddings, `layer_L` the output of the last of L layers, before the final norm."""
    return f"layer_{layer}"


def encode(tokenizer: Any, records: Sequence[Record]) -> list[tuple[list[int], list[int]]]:
    """Token ids of each conversation, and the positions at which its response tokens are predicted.

    Raises UserError naming pair_id and language where the chat template refuses a conversation.
    """
    encoded = []
    tokens = ChatEncoder(tokenizer).encode([record.messages for record in records])
    for record, found in zip(records, tokens, strict=True):
        if isinstance(found, UserError):
            raise UserError(f"pair_id {record.pair_id!r}, {record.lang}: {found}")
        ids = [token if token >= 0 else ~token for token in found]
        encoded.append((ids, [place - 1 for place, token in enumerate(found) if token < 0]))
    return encoded


@torch.inference_mode()
def pooled_states(
    model: Model, encoded: Sequence[tuple[list[int], list[int]]], layers: Sequence[int], batch_size: int
) -> dict[str, np.ndarray]:
    """Means over response positions, float32 [records, d] by name: `layer_i`, `final` and `soft_tokens`.

    `final` is the decoder's output, after the final norm; `soft_tokens` is the mean of softmax(logits) E.
    Raises UserError where memory runs out.
    """
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    pooled: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(encoded) for name in _names(layers)}
    head = head_config(model)
    with tqdm(total=len(encoded), desc="states", unit="record") as progress, _watched(model, layers) as seen:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            try:
                found = _batch(model, head, [encoded[i] for i in batch], seen)
            except torch.OutOfMemoryError:
                raise UserError(f"out of GPU memory at --batch_size {batch_size}; take a smaller one") from None
            for name, rows in found.items():
                for i, row in zip(batch, rows, strict=True):
                    pooled[name][i] = row
            progress.update(len(batch))
    return {name: torch.stack(rows).numpy() for name, rows in pooled.items()}


def _names(layers: Sequence[int]) -> list[str]:
    return [*map(layer_name, layers), FINAL, SOFT]


@contextmanager
def _watched(model: Model, layers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """What the layers put out in the last forward pass, [B, N, d] by name.

    transformers' own `output_hidden_states` gives the last layer's only after the final norm.
    """
    blocks, seen = model.get_decoder().layers, {}
    handles = []

    def keep(name: str, output: Any) -> None:
        seen[name] = output[0] if isinstance(output, tuple) else output

    for layer in layers:
        name = layer_name(layer)
        if layer == 0:
            handles.append(blocks[0].register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0])))
        else:
            hook = blocks[layer - 1].register_forward_hook
            handles.append(hook(lambda _, args, output, name=name: keep(name, output)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _batch(
    model: Model, head: HeadConfig, batch: Sequence[tuple[list[int], list[int]]], seen: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Pooled rows [B, d] of one batch, on the CPU."""
    width = max(len(ids) for ids, _ in batch)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
    device = model.device
    final = model.get_decoder()(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False)[0]
    flat = [row * width + place for row, (_, places) in enumerate(batch) for place in places]
    positions = torch.tensor(flat, device=device)
    counts = torch.tensor([len(places) for _, places in batch], device=device)
    sequence = torch.repeat_interleave(torch.arange(len(batch), device=device), counts)

    def mean(states: Tensor) -> Tensor:
        selected = states.flatten(0, 1).index_select(0, positions).float()
        sums = torch.zeros(len(batch), selected.shape[-1], device=device).index_add_(0, sequence, selected)
        return sums / counts[:, None]

    rows = {name: mean(states) for name, states in (seen | {FINAL: final}).items()}
    hidden = final.flatten(0, 1).index_select(0, positions)
    rows[SOFT] = soft_summaries(model, head, hidden, sequence, len(batch))
    return {name: row.cpu() for name, row in rows.items()}


def soft_summaries(model: Model, head: HeadConfig, hidden: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Compute [sequences, d] means of softmax(logits) E over each sequence's positions: the loss's u at temperature 1.

    hidden: [T, d] final hidden states at response positions; sequence: [T] the sequence of each.
    """
    weight = model.get_output_embeddings().weight
    chunk = max(1, CHUNK_ELEMENTS // len(weight))
    logit_chunks = (
        head_logits(rows, weight, head.bias, head.logit_scale, head.softcap, torch.float32)
        for rows in hidden.split(chunk)
    )
    embedding = model.get_input_embeddings().weight
    rows_at_once = max(1, CHUNK_ELEMENTS // embedding.shape[1])
    return mean_soft_tokens(logit_chunks, sequence, sequences, embedding, rows_at_once)
