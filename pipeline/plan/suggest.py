"""The nearest settings that fit, and the fastest ones."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product

from pipeline.loss.settings import Head
from pipeline.plan.prediction import GIB, Cluster, Plan

BUDGETS_MB = (128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
OFFLOADS = ("none", "optimizer", "optimizer and parameters")
HEADS: tuple[Head, ...] = ("vocab_parallel", "gathered")


@dataclass(frozen=True)
class Choice:
    """What may be changed without changing what is learned; the global batch stays."""

    micro: int
    checkpointing: bool
    offload: str
    head: Head
    budget_mb: float

    def apply(self, plan: Plan) -> Plan:
        config, zero = plan.run.config, plan.run.zero
        return replace(
            plan,
            run=replace(
                plan.run,
                config=replace(
                    config,
                    model=replace(config.model, activation_checkpointing=self.checkpointing),
                    loss=replace(config.loss, head=self.head, memory_budget_mb=self.budget_mb),
                    training=replace(config.training, train_micro_batch_size_per_gpu=self.micro),
                ),
                zero=replace(
                    zero,
                    offload_optimizer=self.offload != OFFLOADS[0],
                    offload_param=self.offload == OFFLOADS[2],
                ),
            ),
        )


def current(plan: Plan) -> Choice:
    """The recipe's own settings, `auto` and null resolved."""
    zero, config = plan.run.zero, plan.run.config
    offload = OFFLOADS[2] if zero.offload_param else OFFLOADS[1] if zero.offload_optimizer else OFFLOADS[0]
    head: Head = "gathered" if plan.run.head == "gathered" else "vocab_parallel"
    return Choice(plan.run.rows, plan.run.checkpointing, offload, head, config.loss.memory_budget_mb or 2048.0)


def micro_batches(plan: Plan) -> list[int]:
    """Rows per rank that the global batch divides into, few enough to be of use."""
    per_rank = plan.run.config.training.train_batch_size // plan.run.ranks
    return [n for n in range(1, min(per_rank, 64) + 1) if per_rank % n == 0]


def alternatives(plan: Plan) -> dict[str, list]:
    """Field of Choice -> values to try."""
    return {
        "micro": micro_batches(plan),
        "checkpointing": [False, True],
        "offload": list(OFFLOADS),
        "head": list(HEADS) if plan.run.ranks > 1 else [HEADS[0]],
        "budget_mb": list(BUDGETS_MB),
    }


def nearest_fit(plan: Plan) -> tuple[str, Plan] | None:
    """The fewest changes after which the plan fits, the fastest of them; more nodes where nothing else helps."""
    now, options = current(plan), alternatives(plan)
    for count in range(1, len(options) + 1):
        found: list[tuple[float, str, Plan]] = []
        for names in combinations(options, count):
            for values in product(*([v for v in options[name] if v != getattr(now, name)] for name in names)):
                changes = dict(zip(names, values, strict=True))
                other = replace(now, **changes).apply(plan)
                if other.fits:
                    said = ", ".join(f"{KEYS[name]} {_said(value)}" for name, value in changes.items())
                    found.append((other.time.overlapped, said, other))
        if found:
            _, said, other = min(found, key=lambda item: item[0])
            return said, other
    return _more_nodes(plan)


def _more_nodes(plan: Plan) -> tuple[str, Plan] | None:
    """The same GPUs on more nodes, everything in its thriftiest setting."""
    thrifty = Choice(1, True, OFFLOADS[2], "vocab_parallel", BUDGETS_MB[0])
    cluster, t = plan.cluster, plan.run.config.training
    for nodes in range(cluster.nodes + 1, 4096 // cluster.per_node + 1):
        ranks = nodes * cluster.per_node
        if t.train_batch_size % ranks or plan.run.facts.vocab % ranks:
            continue
        other = thrifty.apply(Plan(replace(plan.run, ranks=ranks), Cluster(nodes, cluster.per_node, cluster.device)))
        if other.fits:
            return f"--nodes {nodes}, with the thriftiest settings", other
    return None


KEYS = {
    "micro": "training.train_micro_batch_size_per_gpu",
    "checkpointing": "model.activation_checkpointing",
    "offload": "DeepSpeed offload of",
    "head": "loss.head",
    "budget_mb": "loss.memory_budget_mb",
}


def _said(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def candidates(plan: Plan) -> Iterator[tuple[Choice, Plan]]:
    for values in product(*alternatives(plan).values()):
        choice = Choice(*values)
        yield choice, choice.apply(plan)


def suggest(plan: Plan) -> tuple[Choice, Plan] | None:
    """The fastest settings that fit; of equally fast ones (1 %) the one that is fastest without overlap, too."""
    fitting = [(choice, other) for choice, other in candidates(plan) if other.fits]
    if not fitting:
        return None
    best = min(other.time.overlapped for _, other in fitting)
    near = [item for item in fitting if item[1].time.overlapped <= 1.01 * best]
    return min(near, key=lambda item: (item[1].time.serial, item[1].memory.peak))


def reasons(choice: Choice, chosen: Plan) -> list[tuple[str, str, str]]:
    """(key, value, what each other value would cost, all else as chosen)."""
    rows = []
    for name, values in alternatives(chosen).items():
        parts = []
        for value in values:
            if value == getattr(choice, name):
                continue
            other = replace(choice, **{name: value}).apply(chosen)
            if other.fits:
                parts.append(f"{_said(value)}: {other.time.overlapped / chosen.time.overlapped:.2f} x the time")
            else:
                host = f", {other.host_bytes / GIB:.0f} GiB of a host" if other.host_bytes else ""
                parts.append(f"{_said(value)}: does not fit ({other.memory.peak / GIB:.1f} GiB{host})")
        rows.append((KEYS[name], _said(getattr(choice, name)), "; ".join(parts)))
    return rows
