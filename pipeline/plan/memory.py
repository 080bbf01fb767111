"""Estimate the peak memory of a rank during an optimizer step, in bytes.

The peak is the sum of two terms. The states (partitions of parameters and optimizer state, buffers) stay allocated. The
temporary memory is the maximum over the loss, the layers and the optimizer step. Memory that libraries allocate
internally (CUDA context, NCCL, allocator overhead) is not included. `Device.reserve_gib` is set aside for it.

Shape letters: C target tokens of a rank in a subchunk, R ranks, v = V/R vocabulary rows, d hidden size, n sequences,
m sequences with a gradient.
"""

import math
from dataclasses import dataclass

from pipeline.loss.kernels import CACHE_BYTES, row_stride
from pipeline.loss.top_k import BLOCK
from pipeline.plan.workload import PlannedRun

# Bytes of a target token of any rank in the tables of the loss: its id as received and in chunk order, its sequence in
# the micro-step and in the chunk, index among those with a gradient, two weights, cross entropy, kept mass and entropy.
TABLE_BYTES = 5 * 8 + 2 * 4 + 3 * 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimated bytes of one rank, by name.

    Attributes:
        states: allocated permanently.
        loss: temporary memory in the loss, including activations.
        layers: temporary memory in the layers.
        step: temporary memory in the optimizer step.
        host: states in CPU memory.
    """

    states: dict[str, int]
    loss: dict[str, int]
    layers: dict[str, int]
    step: dict[str, int]
    host: dict[str, int]

    @property
    def resident(self) -> int:
        """Bytes of all states."""
        return sum(self.states.values())

    @property
    def phases(self) -> dict[str, int]:
        """Temporary bytes by phase."""
        return {"loss": sum(self.loss.values()), "layers": sum(self.layers.values()), "step": sum(self.step.values())}

    @property
    def peak(self) -> int:
        return self.resident + max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])


def estimate_memory(run: PlannedRun) -> MemoryEstimate:
    """Estimate the memory of a rank. All ranks are equal."""
    states, host = _states(run)
    copied = run.ranks > 1 or run.zero.offload_param  # one rank uses its partitions as they are, if they are on the GPU
    gathered = {"gathered parameters": run.gathers.peak_live * run.element_size if copied else 0}
    gathered |= _node_copies(run)
    saved = run.activations.saved(run.stats.config.num_hidden_layers, run.checkpointing)
    return MemoryEstimate(
        states=states,
        loss={"activations": saved, **gathered, **_loss_chunk(run)},
        layers=_layers(run) | gathered,
        step=_optimizer_step(run),
        host=host,
    )


def _states(run: PlannedRun) -> tuple[dict[str, int], dict[str, int]]:
    """Return the states on the device and on the host."""
    e, trained = run.element_size, run.trained_elements
    vocabulary = sum(-(-size // run.vocabulary_ranks) for size in run.stats.vocabulary)
    optimizer = {
        "fp32 parameters": 4 * trained,  # a copy, even if the parameters are fp32
        "Adam moments": 8 * trained,
        "fp32 gradients": 4 * trained,
    }
    states = {
        "parameters": e * run.local_elements,
        "persistent parameters": e * sum(run.persistent_sizes) if run.ranks > 1 else 0,
        "vocabulary gradients": 0 if run.frozen_head else 4 * vocabulary,
        "reduce bucket": e * run.zero.reduce_bucket_size if run.zero.contiguous_gradients else 0,
    }
    host: dict[str, int] = {}
    if run.zero.offload_optimizer:
        # DeepSpeed keeps the accumulated gradient and the optimizer's own copy of it, in pinned memory.
        host |= optimizer | {"fp32 gradients": _pinned(run, [4 * trained])}
        host["optimizer's gradients"] = _pinned(run, [4 * size for size in _sub_groups(run)])
    else:
        states |= optimizer
    if run.zero.offload_param:
        del states["parameters"]
        frozen = (-(-size // run.ranks) for size in (*run.stats.frozen_matrices, *run.stats.frozen_vectors))
        host["parameters"] = _pinned(run, [e * size for size in (*_sub_groups(run), *frozen)])
        states["vocabulary"] = e * vocabulary
    return states, host


def _pinned(run: PlannedRun, sizes: list[int]) -> int:
    """Return the bytes of pinned tensors. torch rounds each up to a power of two. On a CPU, nothing is pinned."""
    return sum(1 << (size - 1).bit_length() if run.gpu and size else size for size in sizes)


def _sub_groups(run: PlannedRun) -> list[int]:
    """Return this rank's elements of each sub-group of the optimizer."""
    groups = []
    for sizes in (run.stats.matrices, run.stats.vectors):
        group = 0
        for size in sizes:
            group += -(-size // run.ranks)
            if group >= run.zero.sub_group_size:
                groups.append(group)
                group = 0
        groups.append(group)
    return groups


def _loss_chunk(run: PlannedRun) -> dict[str, int]:
    """Return the temporary memory of the loss at its peak: the logits buffer and other tensors."""
    e, d, ranks, c = run.element_size, run.stats.hidden_size, run.vocabulary_ranks, run.chunking
    accumulation_size = max(4, e)
    vocab_parallel = run.head == "vocab_parallel"
    rows = c.subchunk_tokens * (ranks if vocab_parallel else 1)
    columns = run.stats.vocab_size / ranks if vocab_parallel else run.stats.vocab_size
    sequences = c.chunk_sequences * (ranks if vocab_parallel else 1)
    with_gradient = run.workload.pairs / max(1e-9, run.workload.sequences) if "pivot" in run.config.loss.detach else 1.0
    buffers = 1 + run.config.loss.needs_second_softmax + run.stats.softcap
    extra_rows = sequences if run.stats.tied and vocab_parallel and not run.frozen_head else 0
    # Weighted hidden states of a subchunk, and their gradient. The ring head sums its gradient in fp32.
    temporary = rows * d * (2 * e if vocab_parallel else e + accumulation_size)
    if not run.gpu:
        # Scaling in half precision has fp32 temporaries.
        temporary += rows * d * 4 if e < 4 else 0
        # CPU kernels read the logits tile by tile, convert half precision to fp32 twice, and accumulate their matrix
        # products in a separate tensor.
        tile = min(rows * columns * e, CACHE_BYTES)
        product = run.stats.vocab_size / ranks * d * e if e < 4 and not run.frozen_head else 0
        temporary = max(temporary, tile if e == 4 else 4 * tile, product)
    parts = {
        "logits": (rows * buffers + extra_rows) * row_stride(math.ceil(columns), run.gpu) * e,
        # Of this rank, with their gradient, and those of a middle layer, if they are aligned.
        "hidden states": (2 if run.config.loss.pools_vocabulary else 3) * c.target_tokens * d * e,
        # Of the target tokens of all ranks, and the pooled representations of all sequences.
        "tables": ranks * c.target_tokens * TABLE_BYTES
        + ranks * run.micro_batch_size * run.workload.sequences * d * accumulation_size,
    }
    backward = {
        # Pooled probabilities of all sequences, and those of sequences with a gradient again, with their gradients.
        "pooled probabilities": run.config.loss.pools_vocabulary
        * (sequences * columns * (accumulation_size + with_gradient * (accumulation_size + e))),
        "passing": temporary,
    }
    forward: dict[str, float] = {}
    if run.config.loss.num_selected is not None:
        # Block maxima and candidates of the selection (on a GPU, the numbers of the blocks that it may choose), their
        # order, and the k largest with their columns, of which the backward pass keeps columns and probabilities.
        selected = min(run.config.loss.num_selected, columns)
        candidates = max(min(selected * BLOCK, columns) * e, columns / BLOCK * 2 * run.gpu)
        per_row = columns / BLOCK * e + candidates + selected * (2 * e + 3 * 8)
        forward["top-k"] = rows * per_row
        backward["top-k"] = rows * selected * (8 + accumulation_size)
    if vocab_parallel and ranks > 1:
        # Hidden states and the partial gradients from all ranks, each for two subchunks if there are several.
        several = c.subchunks > 1
        forward["exchange buffers"] = rows * d * e * (4 if several else 1)
        backward["exchange buffers"] = rows * d * e * (4 if several else 2)
    if not vocab_parallel:
        block_rows = run.buffer_sizes.block_rows(run.config.loss)
        blocks = min(2, -(-run.buffer_sizes.shard_rows // block_rows))
        # Blocks of the head, this rank's part of one, and the block's logits before they are copied. In the backward
        # pass, the gradients of the blocks, and a copy of the logits' gradient unless one block is the whole head.
        block, logits = ranks * block_rows * d, ranks * block_rows * rows * e
        gradient = 0 if run.frozen_head else accumulation_size
        backward["blocks"] = blocks * block * (e + gradient) + (logits if blocks > 1 else 0)
        forward = max(forward, {"blocks": blocks * block * e + block / ranks * e + logits}, key=_total)
    return {name: round(size) for name, size in (parts | max(forward, backward, key=_total)).items()}


def _total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def _node_copies(run: PlannedRun) -> dict[str, int]:
    """Return the bytes that a rank keeps of its node's copy of the parameters with hpZ, until the update."""
    if run.zero.hpz == 1:
        return {}
    shards = sum(run.stats.vocabulary) // run.vocabulary_ranks if run.vocabulary_ranks < run.ranks else 0
    secondary = sum(-(-size // run.zero.hpz) for size in run.secondary_sizes)
    return {"vocabulary shards": run.element_size * shards, "secondary partitions": run.element_size * secondary}


def _layers(run: PlannedRun) -> dict[str, int]:
    """Return the temporary memory at the layer where activations plus reduction copies peak."""
    copies = _reduction_copies(run)
    moments = [
        (run.activations.peak(index + 1, run.checkpointing), copies.get(index, 0))
        for index in range(len(run.stats.layers))
    ]
    activations, copy = max(moments, key=sum)
    return {"activations": activations, "reduction": copy}


def _reduction_copies(run: PlannedRun) -> dict[int, int]:
    """Return the bytes that reducing a bucket copies, by layer whose backward triggers the reduction.

    See `zero3.partitions`. Several ranks copy a bucket rank by rank, unless it is one parameter without padding. With
    an offloaded optimizer, the reduced part is converted to fp32.
    """
    copies: dict[int, int] = {}
    for index, sizes in reduce_scatters(run):
        full = sum(-(-size // run.ranks) * run.ranks for size in sizes)
        is_copied = run.ranks > 1 and (len(sizes) > 1 or sizes[0] % run.ranks != 0)
        copy = full * run.element_size if is_copied else 0
        fp32_part = full // run.ranks * 4 if run.zero.offload_optimizer and run.element_size < 4 else 0
        copies[index] = max(copies.get(index, 0), copy + fp32_part)
    return copies


def reduce_scatters(run: PlannedRun) -> list[tuple[int, list[int]]]:
    """Return, for each reduce-scatter of a micro-step, the index of the layer and the parameter sizes.

    The layer is the one whose backward triggers the reduce-scatter, and the sizes are those of the parameters in its
    bucket.
    """
    result: list[tuple[int, list[int]]] = []
    bucket: list[int] = []
    *layers, final = run.stats.trained
    order = [(len(layers) - 1, size) for size in final]
    for index in range(len(layers) - 1, -1, -1):
        # DeepSpeed reduces the gradients of a leaf module after its backward.
        order += [(index, size) for size in layers[index]]
    for index, size in order:
        if bucket and sum(bucket) + size > run.zero.reduce_bucket_size:
            result.append((index, bucket))
            bucket = []
        bucket.append(size)
    return [*result, (0, bucket)] if bucket else result


def _optimizer_step(run: PlannedRun) -> dict[str, int]:
    """Return the fp32 gradient of the largest sub-group; torch's AdamW on a CPU needs two more tensors of that size."""
    if run.zero.offload_optimizer:
        return {"gradients for the optimizer": 0, "vocabulary gradients of all nodes": _node_gradients(run)}
    largest = max(_sub_groups(run))
    return {
        "gradients for the optimizer": 4 * largest,
        "optimizer's temporaries": 0 if run.gpu else 8 * largest,
        "vocabulary gradients of all nodes": _node_gradients(run),
    }


def _node_gradients(run: PlannedRun) -> int:
    """Return the fp32 gradients that a rank receives from all nodes, for one vocabulary matrix."""
    largest = max(run.stats.vocabulary) // run.vocabulary_ranks
    return 0 if run.frozen_head or run.vocabulary_ranks == run.ranks else 4 * largest
