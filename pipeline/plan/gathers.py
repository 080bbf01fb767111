"""Simulate which parameters ZeRO-3 gathers, keeps and releases during a micro-step.

A parameter is gathered when a module needs it, or earlier by prefetch. It is released after the module unless it is
reused within `stage3_max_reuse_distance` elements. The simulation follows PartitionedParameterCoordinator of
DeepSpeed 0.19 (runtime/zero/partitioned_param_coordinator.py) in its steady state, in which the order of modules is
known. The vocabulary matrices are left out because the trainer never gathers them.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

from pipeline.plan.model_facts import ModelStats

# DeepSpeed's defaults for keys that a configuration file leaves out (runtime/zero/config.py).
DEEPSPEED_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "sub_group_size": 1_000_000_000,
}


@dataclass(frozen=True)
class ZeroSettings:
    """DeepSpeed settings that determine memory and communication sizes. Numbers are in elements.

    Attributes:
        hpz: `zero_hpz_partition_size`, the number of ranks of a secondary partition; 1 if there are none.
    """

    reduce_bucket_size: int
    prefetch_bucket_size: int
    max_live_parameters: int
    max_reuse_distance: int
    persistence_threshold: int
    sub_group_size: int
    contiguous_gradients: bool
    overlap_comm: bool
    offload_optimizer: bool
    offload_param: bool
    hpz: int = 1

    @classmethod
    def from_config(cls, ds: dict) -> "ZeroSettings":
        """Read the settings from a DeepSpeed configuration."""
        zero = ds["zero_optimization"]
        number = {key: int(zero.get(key, default)) for key, default in DEEPSPEED_DEFAULTS.items()}
        return cls(
            reduce_bucket_size=number["reduce_bucket_size"],
            prefetch_bucket_size=number["stage3_prefetch_bucket_size"],
            max_live_parameters=number["stage3_max_live_parameters"],
            max_reuse_distance=number["stage3_max_reuse_distance"],
            persistence_threshold=number["stage3_param_persistence_threshold"],
            sub_group_size=number["sub_group_size"],
            contiguous_gradients=bool(zero.get("contiguous_gradients", True)),
            overlap_comm=bool(zero.get("overlap_comm", True)),
            offload_optimizer=_is_offloaded(zero.get("offload_optimizer")),
            offload_param=_is_offloaded(zero.get("offload_param")),
            hpz=int(zero.get("zero_hpz_partition_size", 1)),
        )


def _is_offloaded(section: dict | None) -> bool:
    return (section or {}).get("device", "none") != "none"


@dataclass(frozen=True)
class GatherSimulation:
    """Parameter gathers of one micro-step.

    Attributes:
        gathered_sizes: number of elements of the gathered parameter, for each gather.
        peak_live: maximum number of elements in full parameters and gather buffers at any time.
        calls: number of collectives.
        persistent_sizes: number of elements of each parameter that is never released.
    """

    gathered_sizes: tuple[int, ...]
    peak_live: int
    calls: int
    persistent_sizes: tuple[int, ...]

    def gathered_elements(self, ranks: int) -> int:
        """Return the elements of all gathers, with each parameter padded to a multiple of the world size."""
        return sum(-(-size // ranks) * ranks for size in self.gathered_sizes)


Module = tuple[tuple[int, int], ...]  # (parameter id, elements) of the parameters that a module owns


@dataclass(frozen=True)
class ModuleSizes:
    """Parameter sizes of the modules in each layer, and of the modules after the last layer."""

    layers: tuple[tuple[tuple[int, ...], ...], ...]
    final: tuple[tuple[int, ...], ...]


def module_trace(sizes: ModuleSizes, checkpointing: bool) -> tuple[Module, ...]:
    """Return the modules in the order in which forward and then backward execute them."""
    count = 0

    def number(modules: tuple[tuple[int, ...], ...]) -> list[Module]:
        """Number the parameters consecutively."""
        nonlocal count
        numbered = []
        for module in modules:
            numbered.append(tuple((count + i, size) for i, size in enumerate(module)))
            count += len(module)
        return numbered

    layers = [number(layer) for layer in sizes.layers]
    final = number(sizes.final)
    trace = [module for layer in layers for module in layer] + final + final[::-1]
    for modules in layers[::-1]:
        trace += (modules if checkpointing else []) + modules[::-1]
    return tuple(trace)


def simulate_gathers(
    stats: ModelStats, settings: ZeroSettings, checkpointing: bool, leaf_modules: bool = True
) -> GatherSimulation:
    """Simulate one micro-step in steady state.

    Args:
        leaf_modules: whether each decoder layer is a ZeRO-3 leaf module, whose parameters are fetched and released
            together.
    """
    layers = stats.layers
    if leaf_modules:
        layers = tuple((tuple(chain.from_iterable(layer)),) for layer in layers)
    return _simulate(ModuleSizes(layers, stats.final), settings, checkpointing, leaf_modules)


@lru_cache(maxsize=256)
def _simulate(sizes: ModuleSizes, settings: ZeroSettings, checkpointing: bool, leaf_modules: bool) -> GatherSimulation:
    trace = module_trace(sizes, checkpointing)
    forward_steps = sum(len(layer) for layer in sizes.layers) + len(sizes.final)
    coordinator = _SimulatedCoordinator(trace, settings, forward_steps if leaf_modules else None)
    for step, module in enumerate(trace):
        coordinator.fetch(step, module)
        coordinator.release(step + 1, module)  # DeepSpeed has advanced its step counter when it releases
    parameters = {p: size for module in trace for p, size in module}
    persistent = tuple(size for size in parameters.values() if size <= settings.persistence_threshold)
    return GatherSimulation(tuple(coordinator.gathered_sizes), coordinator.peak_live, coordinator.calls, persistent)


class _SimulatedCoordinator:
    """State of DeepSpeed's PartitionedParameterCoordinator. Names follow DeepSpeed's.

    Args:
        trace: the modules in the order of execution.
        settings: the settings of ZeRO-3.
        decoder_step: with leaf modules, the trace step at which backward begins. DeepSpeed traces the decoder itself
            there, and when it releases a leaf module it counts all parameters inside as used.
    """

    def __init__(self, trace: tuple[Module, ...], settings: ZeroSettings, decoder_step: int | None) -> None:
        self.trace, self.settings, self.decoder_step = trace, settings, decoder_step
        self.param_queue = deque((p, size, step) for step, module in enumerate(trace) for p, size in module)
        self.most_recent_fetch: dict[int, int] = {}  # parameter -> trace step that it was last fetched for
        self.available = {p for module in trace for p, size in module if size <= settings.persistence_threshold}
        self.inflight: dict[int, _CoalescedGather] = {}
        # DeepSpeed counts from 0 at the start of a forward pass, even if parameters are already available.
        self.n_available = self.live = self.peak_live = self.calls = 0
        self.gathered_sizes: list[int] = []

    def fetch(self, step: int, module: Module) -> None:
        """Make the parameters of a module available, and prefetch later ones."""
        self._all_gather(module)
        for p, _ in module:
            gather = self.inflight.pop(p, None)
            if gather is not None:
                self._wait(gather)
                gather.not_waited_for -= 1
                self.live -= 0 if gather.not_waited_for else gather.buffer
        expected = {p for p, _ in module if self.most_recent_fetch.get(p, -1) < step}
        while expected and self.param_queue:
            p, _, used_at = self.param_queue.popleft()
            self.most_recent_fetch[p] = used_at
            expected.discard(p)
        self._prefetch()

    def _prefetch(self) -> None:
        s = self.settings
        limit = min(s.max_live_parameters - self.n_available, s.prefetch_bucket_size)
        bucket: dict[int, int] = {}
        while self.param_queue and sum(bucket.values()) < limit:
            p, size, used_at = self.param_queue.popleft()
            if p not in self.available and p not in self.inflight:
                bucket[p] = size
            self.most_recent_fetch[p] = max(self.most_recent_fetch.get(p, -1), used_at)
        self._all_gather(tuple(bucket.items()))

    def _all_gather(self, parameters: Iterable[tuple[int, int]]) -> None:
        absent = [(p, size) for p, size in parameters if p not in self.available and p not in self.inflight]
        if not absent:
            return
        total = sum(size for _, size in absent)
        # A single parameter is gathered in place. Several are gathered into a flat buffer and then copied.
        buffer = total if len(absent) > 1 else 0
        gather = _CoalescedGather(dict(absent), buffer, not_waited_for=len(absent))
        self.inflight |= {p: gather for p, _ in absent}
        self.gathered_sizes += [size for _, size in absent]
        self.n_available += total
        self.calls += 1
        self._allocate(total)

    def _wait(self, gather: "_CoalescedGather") -> None:
        """Make all parameters of the gather available. The buffer is freed once all of them have been waited for."""
        if not gather.complete:
            gather.complete = True
            self.available |= set(gather.sizes)
            self._allocate(gather.buffer)

    def _allocate(self, elements: int) -> None:
        self.live += elements
        self.peak_live = max(self.peak_live, self.live)

    def release(self, step: int, module: Module) -> None:
        """Release parameters that are not persistent, not fetched for a later step, and not reused soon."""
        s = self.settings
        released = {
            p: size
            for p, size in module
            if size > s.persistence_threshold and self.most_recent_fetch.get(p, -1) <= step
        }
        distance = 0
        for later_step, later in enumerate(self.trace[step:], step):
            if distance >= s.max_reuse_distance or not released:
                break
            if later_step == self.decoder_step:
                released.clear()
                break
            for p, size in later:
                released.pop(p, None)
                distance += size
        for p, size in released.items():
            self.available.discard(p)
            self.n_available -= size
            self.live -= size


@dataclass
class _CoalescedGather:
    """The parameters of one collective.

    Attributes:
        buffer: number of elements in the flat buffer.
        not_waited_for: number of parameters that have been gathered but not waited for.
    """

    sizes: dict[int, int]
    buffer: int
    not_waited_for: int
    complete: bool = False
