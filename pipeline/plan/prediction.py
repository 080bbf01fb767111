"""A plan: memory, messages, arithmetic and time of one recipe on one cluster."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from pipeline.common.hardware import Device
from pipeline.plan.memory import Memory, memory
from pipeline.plan.step_time import Flops, StepTime, StepWork, flops, loss_bytes, step_time
from pipeline.plan.traffic import Transfer, transfers
from pipeline.plan.workload import Run

GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    """`nodes` with `per_node` GPUs each."""

    nodes: int
    per_node: int
    device: Device

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Plan:
    """What a run would hold, send and take."""

    run: Run
    cluster: Cluster

    @cached_property
    def memory(self) -> Memory:
        return memory(self.run)

    @cached_property
    def work(self) -> StepWork:
        return StepWork(flops(self.run), loss_bytes(self.run), transfers(self.run))

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
        """Bytes of one GPU that may be planned with."""
        device = self.cluster.device
        return (device.memory_gib - device.reserve_gib) * GIB

    @property
    def host_bytes(self) -> int:
        """What a node's host holds of its ranks."""
        return sum(self.memory.host.values()) * self.cluster.per_node

    @property
    def fits(self) -> bool:
        host = self.cluster.device.host_memory_gib * GIB
        return self.memory.peak <= self.available and self.host_bytes <= host

    @property
    def tokens_per_second(self) -> float:
        """Real tokens of the whole cluster."""
        return self.run.config.training.train_batch_size * self.run.work.tokens / self.time.overlapped

    @property
    def mfu(self) -> float:
        """As metrics.jsonl has it: 6 x parameters x tokens per second over the peak, attention not counted."""
        peak = self.cluster.device.flops(self.run.precision) * self.run.ranks
        return 6 * self.run.facts.parameters * self.tokens_per_second / peak

    @property
    def hours(self) -> float:
        return self.run.max_steps * self.time.overlapped / 3600

    def between_nodes(self) -> float:
        """Bytes that a rank receives from other nodes in a step."""
        return sum(t.between_nodes(self.run.ranks, self.cluster.per_node) for t in self.transfers)

    def as_json(self) -> dict[str, Any]:
        """All figures, in bytes, seconds, FLOPs."""
        m, run = self.memory, self.run
        return {
            "parameters": run.facts.parameters,
            "ranks": run.ranks,
            "gpu": asdict(self.cluster.device),
            "micro_batch_rows": run.rows,
            "tokens_per_row": run.work.width,
            "gradient_accumulation_steps": run.accumulation,
            "max_steps": run.max_steps,
            "head": run.head,
            "memory_bytes": asdict(m) | {"peak": m.peak, "peak_phase": m.peak_phase, "available": int(self.available)},
            "activation_bytes": {
                "checkpointing": run.activations.kept(len(run.facts.layers), True),
                "no_checkpointing": run.activations.kept(len(run.facts.layers), False),
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
