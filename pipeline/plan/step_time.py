"""Estimate the seconds of an optimizer step: computation, memory traffic, communication, and their overlap.

The model is a roofline: matrix products run at a fraction of the peak, other operations at the memory bandwidth, and
collectives at a fraction of the bandwidth of the slowest link, plus a latency for the start and for each hop of a ring.
On a GPU, the work of the host per layer overlaps with the device, and the slower of the two counts.
"""

from dataclasses import dataclass

from pipeline.common.hardware import Device
from pipeline.models.packed_attention import MASKED
from pipeline.plan.traffic import Transfer
from pipeline.plan.workload import PlannedRun
from pipeline.zero3.cluster_speeds import cluster_speeds

# Bytes that the update reads and writes per parameter: fp32 gradient, two moments, fp32 parameter, the copy in the
# compute dtype, gradient norm and clipping.
OPTIMIZER_BYTES = 44
HOST_MEMORY_EFFICIENCY = 0.5  # fraction of the CPU memory's bandwidth that an offloaded optimizer reaches; assumed
# Host time of a layer that is a leaf module, relative to that with hooks on each of its modules. Measured on CPU ranks
# with whole steps of 24 tiny layers, see docs/scaling.md.
LEAF_HOST_FRACTION = 0.66


@dataclass(frozen=True)
class Flops:
    """FLOPs of one rank and micro-step.

    Attributes:
        layers: matrix products outside attention, including recomputation.
        attention: scores and their products with the values.
        loss: matrix products with the vocabulary matrices.
    """

    layers: float
    attention: float
    loss: float

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.loss


@dataclass(frozen=True)
class StepWork:
    """Work of a rank, from which the step time is computed.

    Attributes:
        flops: FLOPs of one micro-step.
        loss_bytes: bytes that the loss of one micro-step reads and writes.
        transfers: communication of one optimizer step.
    """

    flops: Flops
    loss_bytes: float
    transfers: list[Transfer]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        compute: computation time by part: layers, loss, optimizer, and host (the time to start the layers,
            which overlaps with them).
        messages: communication time by transfer.
        serial: total without overlap.
        overlapped: total with all overlap that the schedule allows.
    """

    compute: dict[str, float]
    messages: dict[str, float]
    serial: float
    overlapped: float


def estimate_flops(run: PlannedRun) -> Flops:
    """Estimate the FLOPs of a micro-step.

    A multiply-add counts as 2 FLOPs. Backward counts as 2 times forward, as 1 time for frozen weights, or as 2.5 times
    for fused attention, which recomputes the scores.
    """
    config, tokens = run.stats.config, run.micro_batch_tokens
    recomputed = 1 if run.checkpointing else 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if run.attention in MASKED:
        keys: float = run.workload.padded_tokens  # kernels with a mask compute scores over the full row
    else:
        # Kernels that read the sequence boundaries compute half of the score matrix of each sequence (causal).
        keys = run.workload.tokens / max(1.0, run.workload.sequences) / 2
    scores = 4 * tokens * keys * head_dim * config.num_attention_heads * len(run.stats.layers)
    loss = run.loss_traffic.flops(run.head)
    backward = 2.0 if run.attention == "eager" else 2.5
    all_elements, trained = run.stats.decoder_matrix_elements, run.stats.trained_matrix_elements
    layers = 2.0 * tokens * ((2 + recomputed) * all_elements + trained)
    return Flops(layers, scores * (1 + backward + recomputed), loss)


def step_time(run: PlannedRun, work: StepWork, device: Device, per_node: int) -> StepTime:
    """Estimate the step time on `run.ranks` ranks with `per_node` ranks per node."""
    steps, speeds = run.gradient_accumulation_steps, cluster_speeds(device, run.precision, per_node)
    bandwidth = speeds.memory
    flops, rate = work.flops, speeds.flops
    elementwise = run.activations.elementwise * len(run.stats.layers) * (4 / 3 if run.checkpointing else 1)
    host = len(run.stats.layers) * device.layer_seconds
    host += sum(len(layer) for layer in run.stats.layers) * device.module_seconds
    host *= (1.5 if run.checkpointing else 1) / (1 if run.leaf_modules else LEAF_HOST_FRACTION)
    compute = {
        "layers": steps * ((flops.layers + flops.attention) / rate + elementwise / bandwidth),
        "loss": steps * (flops.loss / rate + work.loss_bytes / bandwidth),
        "optimizer": _optimizer_seconds(run, device, per_node),
        "host": steps * host,
    }
    messages = {
        t.name: speeds.transfer_seconds(t.received, t.between_nodes(run.ranks, per_node), t.calls, t.hops)
        for t in work.transfers
    }
    by_phase = {
        phase: sum(messages[t.name] for t in work.transfers if t.phase == phase)
        for phase in ("layers", "loss", "alone")
    }
    layers = max(compute["layers"], compute["host"])
    serial = layers + compute["loss"] + compute["optimizer"] + sum(messages.values())
    overlapped = (
        (max(layers, by_phase["layers"]) if run.zero.overlap_comm else layers + by_phase["layers"])
        + max(compute["loss"], by_phase["loss"])
        + by_phase["alone"]
        + compute["optimizer"]
    )
    return StepTime(compute, messages, serial, overlapped)


def _optimizer_seconds(run: PlannedRun, device: Device, per_node: int) -> float:
    if not run.zero.offload_optimizer:
        return OPTIMIZER_BYTES * run.trained_elements / (device.memory_gb_s * 1e9)
    # The gradients of each micro-step are copied to the host and back. The updated weights are copied back at the end.
    copied = run.trained_elements * (run.gradient_accumulation_steps * 8 + run.element_size)
    bandwidth = HOST_MEMORY_EFFICIENCY * device.host_memory_gb_s * 1e9 / per_node
    update = OPTIMIZER_BYTES * run.trained_elements / bandwidth
    return copied / (device.host_gb_s * 1e9) + update
