"""Prediction for a run on a cluster: memory, communication, computation and time."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from pipeline.common.hardware import Device
from pipeline.loss import ClusterSpeeds
from pipeline.plan.memory import MemoryEstimate, estimate_memory
from pipeline.plan.step_time import Flops, StepTime, StepWork, estimate_flops, step_time
from pipeline.plan.traffic import Transfer, estimate_transfers
from pipeline.plan.workload import PlannedRun
from pipeline.zero3.cluster_speeds import cluster_speeds

GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    """A cluster of nodes with identical GPUs.

    Attributes:
        per_node: number of GPUs per node.
    """

    nodes: int
    per_node: int
    device: Device

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    def speeds(self, precision: str) -> ClusterSpeeds:
        """Return the speeds in the units of the loss."""
        return cluster_speeds(self.device, precision, self.per_node)


@dataclass(frozen=True)
class Prediction:
    """Prediction for a run on a cluster. Each estimate is computed when it is first used."""

    run: PlannedRun
    cluster: Cluster

    @cached_property
    def memory(self) -> MemoryEstimate:
        return estimate_memory(self.run)

    @cached_property
    def work(self) -> StepWork:
        run = self.run
        return StepWork(estimate_flops(run), run.loss_traffic.memory_bytes(run.head), estimate_transfers(run))

    @property
    def transfers(self) -> list[Transfer]:
        return self.work.transfers

    @property
    def flops(self) -> Flops:
        return self.work.flops

    @cached_property
    def time(self) -> StepTime:
        return step_time(self.run, self.work, self.cluster.device, self.cluster.per_node)

    @property
    def available(self) -> float:
        """Bytes available on one GPU, without the reserve."""
        device = self.cluster.device
        return (device.memory_gib - device.reserve_gib) * GIB

    @property
    def host_bytes(self) -> int:
        """Bytes of CPU memory required by all ranks of a node."""
        return sum(self.memory.host.values()) * self.cluster.per_node

    @property
    def fits(self) -> bool:
        host = self.cluster.device.host_memory_gib * GIB
        return self.memory.peak <= self.available and self.host_bytes <= host

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the whole cluster, without padding."""
        return self.run.config.training.train_batch_size * self.run.workload.tokens / self.time.overlapped

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization as in metrics.jsonl: 6 x parameters (4 x if frozen) x tokens per second / peak."""
        peak = self.cluster.device.flops(self.run.precision) * self.run.ranks
        return self.run.stats.flops_per_token * self.tokens_per_second / peak

    @property
    def hours(self) -> float:
        return self.run.max_steps * self.time.overlapped / 3600

    def between_nodes(self) -> float:
        """Return the bytes that a rank receives from other nodes in an optimizer step."""
        return sum(t.between_nodes(self.run.ranks, self.cluster.per_node) for t in self.transfers)

    def as_json(self) -> dict[str, Any]:
        """Return all estimates in bytes, seconds and FLOPs."""
        m, run = self.memory, self.run
        return {
            "parameters": run.stats.parameters,
            "trained_parameters": sum(run.stats.matrices + run.stats.vectors),
            "ranks": run.ranks,
            "gpu": asdict(self.cluster.device),
            "micro_batch_rows": run.micro_batch_size,
            "tokens_per_row": run.workload.padded_tokens,
            "gradient_accumulation_steps": run.gradient_accumulation_steps,
            "max_steps": run.max_steps,
            "head": run.head,
            "memory_bytes": asdict(m) | {"peak": m.peak, "peak_phase": m.peak_phase, "available": int(self.available)},
            "activation_bytes": {
                "checkpointing": run.activations.saved(len(run.stats.layers), True),
                "no_checkpointing": run.activations.saved(len(run.stats.layers), False),
            },
            "fits": self.fits,
            "transfers": [
                asdict(t) | {"between_nodes": t.between_nodes(run.ranks, self.cluster.per_node)} for t in self.transfers
            ],
            "flops_per_micro_step": asdict(self.flops) | {"total": self.flops.total},
            "seconds": asdict(self.time),
            "tokens_per_second": self.tokens_per_second,
            "mfu": self.mfu,
            "hours": self.hours,
        }
