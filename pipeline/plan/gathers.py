"""Which parameters ZeRO-3 gathers, releases and keeps, step by step: DeepSpeed's own bookkeeping, played on sizes.

A parameter is gathered when a module needs it or ahead of that (prefetch), and released after the module unless it
comes again within `stage3_max_reuse_distance` elements. It follows deepspeed 0.19's PartitionedParameterCoordinator
in its steady state, where the order of modules is known. The vocabulary never takes part: its shards stay at home.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from pipeline.plan.model_facts import ModelFacts

# DeepSpeed's defaults for what a configuration file leaves out (runtime/zero/config.py).
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "sub_group_size": 1_000_000_000,
}


@dataclass(frozen=True)
class ZeroSettings:
    """The part of a DeepSpeed configuration that decides sizes; numbers in elements."""

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

    @classmethod
    def read(cls, ds: dict) -> "ZeroSettings":
        zero = ds["zero_optimization"]
        number = {key: int(zero.get(key, default)) for key, default in DEFAULTS.items()}
        return cls(
            reduce_bucket_size=number["reduce_bucket_size"],
            prefetch_bucket_size=number["stage3_prefetch_bucket_size"],
            max_live_parameters=number["stage3_max_live_parameters"],
            max_reuse_distance=number["stage3_max_reuse_distance"],
            persistence_threshold=number["stage3_param_persistence_threshold"],
            sub_group_size=number["sub_group_size"],
            contiguous_gradients=bool(zero.get("contiguous_gradients", True)),
            overlap_comm=bool(zero.get("overlap_comm", True)),
            offload_optimizer=_offloaded(zero.get("offload_optimizer")),
            offload_param=_offloaded(zero.get("offload_param")),
        )


def _offloaded(section: dict | None) -> bool:
    return (section or {}).get("device", "none") != "none"


@dataclass(frozen=True)
class Gathers:
    """Of one micro-step, in elements of full parameters.

    Attributes:
        sizes: of each parameter gathered, once for every time it is. live: most that are there at once, buffers
            included. persistent: sizes of those that always are.
        calls: collectives.
    """

    sizes: tuple[int, ...]
    live: int
    calls: int
    persistent: tuple[int, ...]

    def elements(self, ranks: int) -> int:
        """Gathered in all, each parameter padded to a multiple of the ranks."""
        return sum(-(-size // ranks) * ranks for size in self.sizes)


Module = tuple[tuple[int, int], ...]  # (parameter, size) of its own parameters


@lru_cache(maxsize=256)
def module_trace(facts: "Shape", checkpointing: bool) -> tuple[Module, ...]:
    """Modules in the order in which forward and then backward come to them."""
    number = 0
    layers: list[list[Module]] = []
    for layer in facts.layers:
        modules = []
        for sizes in layer:
            modules.append(tuple((number + i, size) for i, size in enumerate(sizes)))
            number += len(sizes)
        layers.append(modules)
    final = []
    for sizes in facts.final:
        final.append(tuple((number + i, size) for i, size in enumerate(sizes)))
        number += len(sizes)
    trace = [module for layer in layers for module in layer] + final + final[::-1]
    for modules in layers[::-1]:
        trace += (modules if checkpointing else []) + modules[::-1]
    return tuple(trace)


@dataclass(frozen=True)
class Shape:
    """What the trace depends on."""

    layers: tuple[tuple[tuple[int, ...], ...], ...]
    final: tuple[tuple[int, ...], ...]


def gathers(facts: ModelFacts, settings: ZeroSettings, checkpointing: bool) -> Gathers:
    """Of one micro-step in steady state."""
    return _play(Shape(facts.layers, facts.final), settings, checkpointing)


@lru_cache(maxsize=256)
def _play(shape: Shape, settings: ZeroSettings, checkpointing: bool) -> Gathers:
    trace = module_trace(shape, checkpointing)
    coordinator = _Coordinator(trace, settings)
    for step, module in enumerate(trace):
        coordinator.fetch(step, module)
        coordinator.release(step + 1, module)
    sizes = {p: size for module in trace for p, size in module}
    persistent = tuple(size for size in sizes.values() if size <= settings.persistence_threshold)
    return Gathers(tuple(coordinator.gathered), coordinator.peak, coordinator.calls, persistent)


class _Coordinator:
    """State of the parameters; names follow DeepSpeed's."""

    def __init__(self, trace: tuple[Module, ...], settings: ZeroSettings) -> None:
        self.trace, self.settings = trace, settings
        self.queue = deque((p, size, step) for step, module in enumerate(trace) for p, size in module)
        self.fetched_for: dict[int, int] = {}
        self.available = {p for module in trace for p, size in module if size <= settings.persistence_threshold}
        self.inflight: dict[int, _Group] = {}
        # At the start of a forward pass DeepSpeed counts from 0, whatever is there already.
        self.counted = self.live = self.peak = self.calls = 0
        self.gathered: list[int] = []

    def fetch(self, step: int, module: Module) -> None:
        self._gather(module)
        for p, _ in module:
            group = self.inflight.pop(p, None)
            if group is not None:
                self._wait(group)
                group.left -= 1
                self.live -= 0 if group.left else group.buffer
        expected = {p for p, _ in module if self.fetched_for.get(p, -1) < step}
        while expected and self.queue:
            p, _, used = self.queue.popleft()
            self.fetched_for[p] = used
            expected.discard(p)
        self._prefetch()

    def _prefetch(self) -> None:
        s = self.settings
        room = min(s.max_live_parameters - self.counted, s.prefetch_bucket_size)
        ahead: dict[int, int] = {}
        while self.queue and sum(ahead.values()) < room:
            p, size, used = self.queue.popleft()
            if p not in self.available and p not in self.inflight:
                ahead[p] = size
            self.fetched_for[p] = max(self.fetched_for.get(p, -1), used)
        self._gather(tuple(ahead.items()))

    def _gather(self, wanted: Iterable[tuple[int, int]]) -> None:
        new = [(p, size) for p, size in wanted if p not in self.available and p not in self.inflight]
        if not new:
            return
        total = sum(size for _, size in new)
        # One parameter is gathered in place; several through a flat buffer, out of which each is copied.
        group = _Group(dict(new), buffer=total if len(new) > 1 else 0, left=len(new))
        self.inflight |= {p: group for p, _ in new}
        self.gathered += [size for _, size in new]
        self.counted += total
        self.calls += 1
        self._hold(total)

    def _wait(self, group: "_Group") -> None:
        """All its parameters become available; the buffer stays until each has been waited for."""
        if not group.complete:
            group.complete = True
            self.available |= set(group.sizes)
            self._hold(group.buffer)

    def _hold(self, elements: int) -> None:
        self.live += elements
        self.peak = max(self.peak, self.live)

    def release(self, step: int, module: Module) -> None:
        """What is not persistent, not fetched for a later step, and not used again soon."""
        s = self.settings
        free = {p: size for p, size in module if size > s.persistence_threshold}
        free = {p: size for p, size in free.items() if self.fetched_for.get(p, -1) <= step}
        traversed = 0
        for later in self.trace[step:]:
            if traversed >= s.max_reuse_distance or not free:
                break
            for p, size in later:
                free.pop(p, None)
                traversed += size
        for p, size in free.items():
            self.available.discard(p)
            self.counted -= size
            self.live -= size


@dataclass
class _Group:
    """Parameters of one collective; `left` of them have not been waited for."""

    sizes: dict[int, int]
    buffer: int
    left: int
    complete: bool = False
