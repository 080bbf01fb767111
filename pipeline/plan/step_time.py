"""Seconds of an optimizer step: arithmetic, memory passes, messages, and what of them runs at the same time.

A roofline: matrix products at a share of the peak, other operations at the memory's bandwidth, collectives at a share
of the slowest link's, plus a latency for each hop of a ring and for its start. On a GPU the host's own work per module
runs beside the device, and the slower of the two counts.
"""

from dataclasses import dataclass

from pipeline.common.hardware import Device
from pipeline.plan.traffic import Transfer
from pipeline.plan.workload import Run

# Reads and writes of fp32 gradient, both moments and parameter, the copy in the compute dtype, norm and clipping.
OPTIMIZER_BYTES = 44
# Passes over the buffer of logits: products write and read it, softmax, pooling, inner products and tilt go over it.
LOSS_PASSES = 8
LAUNCH_HOPS = 3  # what it takes to start a collective, in hops: of 0 to 4 those that fit the rows of bench_plan best


@dataclass(frozen=True)
class Flops:
    """Of one rank and micro-step. `layers`: matrix products outside attention, recomputation included."""

    layers: float
    attention: float
    loss: float

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.loss


@dataclass(frozen=True)
class StepWork:
    """Operations, loss memory traffic, and messages from which the step time is computed.

    Attributes:
        flops: of one micro-step. loss_bytes: bytes that the loss of one micro-step reads and writes.
        transfers: of one optimizer step.
    """

    flops: Flops
    loss_bytes: float
    transfers: list[Transfer]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        compute: by part: layers, loss, optimizer, host (the hooks' own time, within which the layers run).
        messages: by transfer. serial: without any overlap; overlapped: with all that the schedule allows.
    """

    compute: dict[str, float]
    messages: dict[str, float]
    serial: float
    overlapped: float


def flops(run: Run) -> Flops:
    """2 per multiplication and addition; backward twice forward, attention's 2.5 times (it recomputes its scores)."""
    config, tokens = run.facts.config, run.rows * run.work.width
    again = 1 if run.checkpointing else 0
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kind = run.config.model.attn_implementation
    # With a mask kernels go over whole rows; the variable-length one over half the square of each sequence.
    span = run.work.tokens / max(1.0, run.work.sequences) / 2 if kind == "flash_attention_2" else run.work.width
    scores = 4 * tokens * span * head * config.num_attention_heads * len(run.facts.layers)
    positions = run.rows * run.work.supervised
    product = 2.0 * run.facts.vocab * run.facts.hidden
    loss = 3 * product * positions + (product * positions if run.chunks.recomputed else 0)
    backward = 2.0 if kind == "eager" else 2.5
    return Flops(2.0 * run.facts.decoder_matrices * tokens * (3 + again), scores * (1 + backward + again), loss)


def step_time(run: Run, work: StepWork, device: Device, per_node: int) -> StepTime:
    """On `run.ranks` ranks, `per_node` on each node."""
    steps, rate, bandwidth = run.accumulation, device.flops(run.precision), device.memory_gb_s * 1e9
    operations, reached = work.flops, rate * device.compute_efficiency
    moved = run.activations.moved * len(run.facts.layers) * (4 / 3 if run.checkpointing else 1)
    modules = sum(len(layer) for layer in run.facts.layers) * (1.5 if run.checkpointing else 1)
    compute = {
        "layers": steps * ((operations.layers + operations.attention) / reached + moved / bandwidth),
        "loss": steps * (operations.loss / reached + work.loss_bytes / bandwidth),
        "optimizer": _optimizer(run, device),
        "host": steps * modules * device.module_seconds,
    }
    messages = {t.name: seconds(t, run.ranks, per_node, device) for t in work.transfers}
    behind = {
        phase: sum(messages[t.name] for t in work.transfers if t.phase == phase)
        for phase in ("layers", "loss", "alone")
    }
    layers = max(compute["layers"], compute["host"])
    serial = layers + compute["loss"] + compute["optimizer"] + sum(messages.values())
    overlapped = (
        (max(layers, behind["layers"]) if run.zero.overlap_comm else layers + behind["layers"])
        + max(compute["loss"], behind["loss"])
        + behind["alone"]
        + compute["optimizer"]
    )
    return StepTime(compute, messages, serial, overlapped)


def loss_bytes(run: Run) -> float:
    """Of a micro-step: passes over the logits, and over head and embedding for each piece and block of them.

    A piece reads the head twice (three times where its logits are computed twice) and adds to its gradient in fp32; a
    block reads the embedding for its summaries and for the directions of their gradients.
    """
    matrix, e, c = run.facts.vocab * run.facts.hidden, run.element, run.chunks
    logits = LOSS_PASSES * run.rows * run.work.supervised * run.facts.vocab * e
    columns = 1 if run.head == "gathered" else run.ranks
    head = matrix / columns * (c.pieces * (2 * e + 8) + c.recomputed * e)
    return logits + head + matrix / run.ranks * c.blocks * 2 * e


def _optimizer(run: Run, device: Device) -> float:
    if not run.zero.offload_optimizer:
        return OPTIMIZER_BYTES * run.own / (device.memory_gb_s * 1e9)
    # Each micro-step's gradients go to the host and back, the updated weights come at the end.
    over = run.own * (run.accumulation * 8 + run.element) / (device.host_gb_s * 1e9)
    return over + OPTIMIZER_BYTES * run.own / (device.host_optimizer_gb_s * 1e9)


def seconds(transfer: Transfer, ranks: int, per_node: int, device: Device) -> float:
    """The slower of the two kinds of link, and the latency of the messages that follow each other."""
    outside = transfer.between_nodes(ranks, per_node)
    network = device.network_gb_s * 1e9 * device.link_efficiency
    inside = (transfer.received - outside) / (device.node_gb_s * 1e9 * device.link_efficiency)
    # On a chain one rank of each node takes everything that comes in, and all wait for it at every hop.
    alone = transfer.pattern == "chain" and ranks > per_node
    between = (transfer.received if alone else outside) / network
    return max(inside, between) + (transfer.hops + LAUNCH_HOPS * transfer.calls) * device.hop_seconds
