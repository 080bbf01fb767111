"""Bytes on one rank at the worst moment of a step.

The sum of what stays (pieces of the parameters and of the optimizer's state, buffers) and of the largest of three
passing needs: in the loss, in the layers, in the optimizer's step. What libraries keep for themselves (CUDA context,
NCCL, allocator slack) is not counted; `Device.reserve` makes room for it.

Shape letters: C rows of a rank in a chunk, R ranks, v = V/R vocabulary rows, d hidden size, n sequences, m moved ones.
"""

from dataclasses import dataclass

from pipeline.loss.kernels import CACHE_BYTES
from pipeline.plan.workload import Run


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        states: what stays from step to step, by name. activations: kept when the loss begins.
        loss, layers, step: needs of the three phases beyond the states, by name. host: in CPU memory, by name.
    """

    states: dict[str, int]
    loss: dict[str, int]
    layers: dict[str, int]
    step: dict[str, int]
    host: dict[str, int]

    @property
    def resident(self) -> int:
        return sum(self.states.values())

    @property
    def phases(self) -> dict[str, int]:
        return {"loss": sum(self.loss.values()), "layers": sum(self.layers.values()), "step": sum(self.step.values())}

    @property
    def peak(self) -> int:
        return self.resident + max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])


def memory(run: Run) -> Memory:
    """Of one rank; all ranks are alike."""
    states, host = _states(run)
    gathered = run.gathers.live * run.element if run.ranks > 1 else 0
    kept = run.activations.kept(run.facts.config.num_hidden_layers, run.checkpointing)
    return Memory(
        states=states,
        loss={"activations": kept, "gathered parameters": gathered, **loss_chunk(run)},
        layers=_layers(run, gathered),
        step=_step(run),
        host=host,
    )


def _states(run: Run) -> tuple[dict[str, int], dict[str, int]]:
    """What stays on the device and on the host."""
    e, own = run.element, run.own
    vocabulary = run.shard(run.facts.vocabulary)
    optimizer = {
        "fp32 parameters": 4 * own,  # beside the parameters even where these are fp32
        "Adam moments": 8 * own,
        "fp32 gradients": 4 * own,
    }
    states = {
        "parameters": e * own,
        "persistent parameters": e * sum(run.persistent) if run.ranks > 1 else 0,
        "vocabulary gradients": 4 * vocabulary,
        "reduce bucket": e * run.zero.reduce_bucket_size if run.zero.contiguous_gradients else 0,
    }
    host: dict[str, int] = {}
    if run.zero.offload_optimizer:
        # DeepSpeed keeps the accumulated gradient and, beside it, the optimizer's own copy.
        host |= {**optimizer, "optimizer's gradients": 4 * own}
    else:
        states |= optimizer
    if run.zero.offload_param:
        host["parameters"] = states.pop("parameters")
        states["vocabulary"] = e * vocabulary
    return states, host


def loss_chunk(run: Run) -> dict[str, int]:
    """At the worst moment of the loss: the buffer of logits and what goes with it."""
    e, d, wide = run.element, run.facts.hidden, max(4, run.element)
    c, ranks = run.chunks, run.ranks
    shared = run.head == "vocab_parallel"
    rows = c.rows * (ranks if shared else 1)
    columns = run.facts.vocab / ranks if shared else run.facts.vocab
    sequences = c.block_sequences * (ranks if shared else 1)
    moved_share = run.work.pairs / max(1e-9, run.work.sequences) if "pivot" in run.config.loss.detach else 1.0
    tensors = 1 + (run.config.loss.softmax_temperature != 1) + run.facts.softcap
    room = sequences if run.facts.tied and shared else 0
    # A chunk's states, weighted, their gradient before and after scaling; a CPU passes over the logits tile by tile,
    # half precisions widened twice, and adds their products in a pass of its own.
    passing = rows * d * (e + wide + (wide if e < 4 else 0))
    if not run.gpu:
        tile = min(rows * columns * e, CACHE_BYTES)
        passing = max(passing, tile if e == 4 else 4 * tile, run.facts.vocab / ranks * d * e if e < 4 else 0)
    parts = {
        "logits": (rows * tensors + room) * columns * e,
        # Sequences' mean probabilities, the moved ones' again, and their directions.
        "pooled probabilities": sequences * columns * (wide + moved_share * (wide + e)),
        "hidden states": 2 * c.positions * d * e,  # own positions and their gradient
        "passing": passing,
    }
    if shared and ranks > 1:
        parts["exchange buffers"] = rows * d * e * (1 if c.pieces == 1 else 3)
    if not shared:
        shard = run.facts.vocab / ranks * d
        # Forward: logits of one shard before they are put in place; backward: its gradient, here and on its way.
        parts["shards on their way"] = min(2, ranks - 1) * shard * e + max(rows * columns * e / ranks, 2 * shard * 4)
    return {name: round(size) for name, size in parts.items()}


def _layers(run: Run, gathered: int) -> dict[str, int]:
    """The moment within backward where activations and the copy that a full reduce bucket makes are worst."""
    moments = []
    flushed = flushes(run)
    for index in range(len(run.facts.layers)):
        moments.append((run.activations.peak(index + 1, run.checkpointing), flushed.get(index, 0)))
    activations, copy = max(moments, key=sum)
    return {"activations": activations, "gathered parameters": gathered, "reduction": copy}


def flushes(run: Run) -> dict[int, int]:
    """Layer -> bytes of the copy that reducing the bucket makes while that layer's gradients come."""
    found: dict[int, int] = {}
    for index, sizes in reductions(run):
        full = sum(-(-size // run.ranks) * run.ranks for size in sizes)
        # Copied rank by rank unless it is one even parameter; then this rank's part in fp32.
        copy = 0 if len(sizes) == 1 and sizes[0] % run.ranks == 0 else full * run.element
        found[index] = max(found.get(index, 0), copy + (full // run.ranks * 4 if run.element < 4 else 0))
    return found


def reductions(run: Run) -> list[tuple[int, list[int]]]:
    """(layer during which it happens, parameters) of each reduce-scatter of a micro-step."""
    found: list[tuple[int, list[int]]] = []
    bucket: list[int] = []
    order = [(len(run.facts.layers) - 1, size) for module in run.facts.final for size in module]
    for index in range(len(run.facts.layers) - 1, -1, -1):
        order += [(index, size) for module in run.facts.layers[index][::-1] for size in module]
    for index, size in order:
        if bucket and sum(bucket) + size > run.zero.reduce_bucket_size:
            found.append((index, bucket))
            bucket = []
        bucket.append(size)
    return [*found, (0, bucket)] if bucket else found


def _step(run: Run) -> dict[str, int]:
    """The gradient of a sub-group as the optimizer gets it; torch's AdamW on a CPU needs two more tensors."""
    if run.zero.offload_optimizer:
        return {"gradients for the optimizer": 0}
    largest = 0
    for sizes in (run.facts.matrices, run.facts.vectors):
        group = 0
        for size in sizes:
            group += -(-size // run.ranks)
            if group >= run.zero.sub_group_size:
                largest, group = max(largest, group), 0
        largest = max(largest, group)
    return {
        "gradients for the optimizer": 4 * largest,
        "optimizer's temporaries": 0 if run.gpu else 8 * largest,
    }
