"""Hidden states and soft tokens of answers written out in full, pooled over each response.

Shape letters: B sequences of a batch, N length of the longest, T response positions, V vocabulary, d hidden size.

Response positions are the positions that predict a response token, as in the training loss. The first one is the last
token of the prompt. Only pooled states are kept, and probabilities are computed for a few positions at a time.
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

CHUNK_ELEMENTS = 1 << 26  # elements of the largest temporary, such as logits [chunk, V]: 256 MB in float32

EncodedRecord = tuple[list[int], list[int]]  # token ids, response positions
Model = Any  # the type annotations of transformers lack the decoder of a causal LM
FINAL, SOFT = "final", "soft_tokens"


def layer_name(layer: int) -> str:
    """Return the name of a layer's output: `layer_0` is the embeddings, `layer_i` the output of the i-th layer."""
    return f"layer_{layer}"


def encode(tokenizer: Any, records: Sequence[Record]) -> list[EncodedRecord]:
    """Encode each conversation as token ids and response positions.

    Raises:
        UserError: the chat template rejects a conversation; the message names the pair_id and language.
    """
    encoded = []
    conversations, tools = [record.messages for record in records], [record.tools for record in records]
    tokens = ChatEncoder(tokenizer).encode(conversations, tools)
    for record, result in zip(records, tokens, strict=True):
        if isinstance(result, UserError):
            raise UserError(f"pair_id {record.pair_id!r}, {record.lang}: {result}")
        ids = [token if token >= 0 else ~token for token in result]  # response tokens are encoded as complements
        encoded.append((ids, [position - 1 for position, token in enumerate(result) if token < 0]))
    return encoded


def select_positions(encoded: Sequence[EncodedRecord], at: str) -> list[EncodedRecord]:
    """Select the positions to average over.

    Args:
        encoded: the records, see `encode`.
        at: `answer` for the response positions; `prompt` for the tokens before the first response that differ between
            records, that is, without what the chat template writes around every question; `prompt_end` for the last
            token before the first response.

    Returns:
        The records with these positions, without the tokens after them.

    Raises:
        UserError: `at` is not `answer` and a record has an empty prompt.
    """
    if at == "answer":
        return list(encoded)
    prompts = [ids[: positions[0] + 1] for ids, positions in encoded]
    first = _common_length(prompts)
    last = _common_length([prompt[first:][::-1] for prompt in prompts])
    if any(len(prompt) <= first + last for prompt in prompts):
        raise UserError("a question is empty or the beginning of another, so it cannot be measured; give --at answer")
    if at == "prompt_end":
        return [(prompt, [len(prompt) - 1]) for prompt in prompts]
    return [(prompt, list(range(first, len(prompt) - last))) for prompt in prompts]


def _common_length(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the longest common beginning."""
    return next(
        (i for i, tokens in enumerate(zip(*sequences, strict=False)) if len(set(tokens)) > 1), min(map(len, sequences))
    )


@torch.inference_mode()
def pooled_states(
    model: Model, encoded: Sequence[EncodedRecord], layers: Sequence[int], batch_size: int
) -> dict[str, np.ndarray]:
    """Compute the representations of each record, averaged over its positions.

    Args:
        model: a causal LM of a supported family.
        encoded: the records, see `encode` and `select_positions`.
        layers: layers whose output is pooled; 0 is the embeddings.
        batch_size: number of sequences in a forward pass.

    Returns:
        float32 [records, d] by name: `layer_i`, the output of layer i; `final`, the decoder output after the final
        norm; `soft_tokens`, the mean of softmax(logits) E, where E are the input embeddings.

    Raises:
        UserError: the GPU ran out of memory.
    """
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i][0]))
    names = [*map(layer_name, layers), FINAL, SOFT]
    pooled: dict[str, list[Tensor]] = {name: [torch.empty(0)] * len(encoded) for name in names}
    head = head_config(model)
    progress = tqdm(total=len(encoded), desc="states", unit="record")
    with progress, _capture_layer_outputs(model, layers) as layer_outputs:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            try:
                rows_by_name = _pool_batch(model, head, [encoded[i] for i in batch], layer_outputs)
            except torch.OutOfMemoryError:
                raise UserError(f"out of GPU memory at --batch_size {batch_size}; use a smaller one") from None
            for name, rows in rows_by_name.items():
                for i, row in zip(batch, rows, strict=True):
                    pooled[name][i] = row
            progress.update(len(batch))
    return {name: torch.stack(rows).numpy() for name, rows in pooled.items()}


@contextmanager
def _capture_layer_outputs(model: Model, layers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that hooks fill with the layer outputs of the latest forward pass, [B, N, d] by name.

    Layer 0 is the embeddings. Hooks are needed because `output_hidden_states` of transformers applies the final norm to
    the output of the last layer.
    """
    blocks, outputs = model.get_decoder().layers, {}
    handles = []

    def store(name: str, output: Any) -> None:
        outputs[name] = output[0] if isinstance(output, tuple) else output

    for layer in layers:
        name = layer_name(layer)
        if layer == 0:
            handles.append(blocks[0].register_forward_pre_hook(lambda _, args, name=name: store(name, args[0])))
        else:
            hook = blocks[layer - 1].register_forward_hook
            handles.append(hook(lambda _, args, output, name=name: store(name, output)))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _pool_batch(
    model: Model, head: HeadConfig, batch: Sequence[EncodedRecord], layer_outputs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Run one batch and return its pooled representations, [B, d] by name, on the CPU.

    `layer_outputs` is filled by the hooks of `_capture_layer_outputs` during the forward call.
    """
    width = max(len(ids) for ids, _ in batch)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
    device = model.device
    final = model.get_decoder()(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False)[0]
    flat = [row * width + position for row, (_, positions) in enumerate(batch) for position in positions]
    indices = torch.tensor(flat, device=device)
    counts = torch.tensor([len(positions) for _, positions in batch], device=device)
    sequence = torch.repeat_interleave(torch.arange(len(batch), device=device), counts)

    def mean(states: Tensor) -> Tensor:
        selected = states.flatten(0, 1).index_select(0, indices).float()
        sums = torch.zeros(len(batch), selected.shape[-1], device=device).index_add_(0, sequence, selected)
        return sums / counts[:, None]

    pooled = {name: mean(states) for name, states in (layer_outputs | {FINAL: final}).items()}
    hidden = final.flatten(0, 1).index_select(0, indices)
    pooled[SOFT] = _pool_soft_tokens(model, head, hidden, sequence, len(batch))
    return {name: rows.cpu() for name, rows in pooled.items()}


def _pool_soft_tokens(model: Model, head: HeadConfig, hidden: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Compute the mean of softmax(logits) E over the positions of each sequence: the soft-token summary.

    The temperature is 1.

    Args:
        model: provides the head's weight and the input embeddings E, [V, d] each.
        head: operations of the model family on the logits.
        hidden: [T, d] final states at response positions.
        sequence: [T] index of the sequence that each position belongs to.
        sequences: number of sequences, B.

    Returns:
        [B, d] in float32.
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
