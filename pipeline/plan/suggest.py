"""Search for the settings that fit in memory and change the recipe least, and for the fastest ones that fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product

from pipeline.loss.head_choice import HEADS
from pipeline.loss.settings import GPU_BUDGET_MB, ResolvedHead
from pipeline.plan.prediction import GIB, Cluster, Prediction

BUDGETS_MB = (128.0, 256.0, 512.0, 1024.0, GPU_BUDGET_MB, 4096.0)
NO_OFFLOAD, OPTIMIZER, OPTIMIZER_AND_PARAMETERS = OFFLOADS = ("none", "optimizer", "optimizer and parameters")
MAX_MICRO_BATCH_SIZE = 64
MAX_GPUS = 4096

# Field of TunableSettings -> its name in the output.
SETTING_LABELS = {
    "micro_batch_size": "training.train_micro_batch_size_per_gpu",
    "checkpointing": "model.activation_checkpointing",
    "offload": "DeepSpeed offload of",
    "head": "loss.head",
    "budget_mb": "loss.memory_budget_mb",
}


@dataclass(frozen=True)
class TunableSettings:
    """Settings that affect the memory and time of a run but not its result. The global batch size is not included."""

    micro_batch_size: int
    checkpointing: bool
    offload: str
    head: ResolvedHead
    budget_mb: float

    @classmethod
    def from_prediction(cls, prediction: Prediction) -> "TunableSettings":
        """Return the tunable settings of a prediction, with `auto` and null replaced by the values used."""
        run = prediction.run
        offload = OPTIMIZER if run.zero.offload_optimizer else NO_OFFLOAD
        if run.zero.offload_param:
            offload = OPTIMIZER_AND_PARAMETERS
        budget_mb = run.config.loss.memory_budget_mb or GPU_BUDGET_MB
        return cls(run.micro_batch_size, run.checkpointing, offload, run.head, budget_mb)

    def apply(self, prediction: Prediction) -> Prediction:
        """Return the prediction for the same run with these settings."""
        run = prediction.run
        config = replace(
            run.config,
            model=replace(run.config.model, activation_checkpointing=self.checkpointing),
            loss=replace(run.config.loss, head=self.head, memory_budget_mb=self.budget_mb),
            training=replace(run.config.training, train_micro_batch_size_per_gpu=self.micro_batch_size),
        )
        zero = replace(
            run.zero,
            offload_optimizer=self.offload != NO_OFFLOAD,
            offload_param=self.offload == OPTIMIZER_AND_PARAMETERS,
        )
        return replace(prediction, run=replace(run, config=config, zero=zero))


def candidate_values(prediction: Prediction) -> dict[str, list]:
    """Return the values to try for each field of TunableSettings.

    The micro-batch size stays as it is if InfoNCE or centring makes the loss depend on it.
    """
    run = prediction.run
    rows_per_rank = run.config.training.train_batch_size * run.sequence_parallel_size // run.ranks
    sizes = [n for n in range(1, min(rows_per_rank, MAX_MICRO_BATCH_SIZE) + 1) if rows_per_rank % n == 0]
    return {
        "micro_batch_size": [run.micro_batch_size] if run.config.loss.compares_micro_step else sizes,
        "checkpointing": [False, True],
        "offload": list(OFFLOADS),
        "head": list(HEADS) if prediction.run.ranks > 1 else [HEADS[0]],
        "budget_mb": list(BUDGETS_MB),
    }


def nearest_fit(prediction: Prediction) -> tuple[str, Prediction] | None:
    """Find the smallest set of changes with which the run fits. Among equally small sets, return the fastest.

    Nodes are added only if no other change helps.

    Returns:
        A description of the changes and the new prediction, or None if no settings fit.
    """
    current, values = TunableSettings.from_prediction(prediction), candidate_values(prediction)
    for count in range(1, len(values) + 1):
        fitting: list[tuple[float, str, Prediction]] = []
        for names in combinations(values, count):
            for chosen in product(*([v for v in values[name] if v != getattr(current, name)] for name in names)):
                changes = dict(zip(names, chosen, strict=True))
                other = replace(current, **changes).apply(prediction)
                if other.fits:
                    description = ", ".join(
                        f"{SETTING_LABELS[name]} {_format(value)}" for name, value in changes.items()
                    )
                    fitting.append((other.time.overlapped, description, other))
        if fitting:
            _, description, other = min(fitting, key=lambda item: item[0])
            return description, other
    return _more_nodes(prediction)


def _more_nodes(prediction: Prediction) -> tuple[str, Prediction] | None:
    """Find the smallest number of nodes on which the run fits, using the settings that need the least memory."""
    micro_batch_size = candidate_values(prediction)["micro_batch_size"][0]
    smallest = TunableSettings(micro_batch_size, True, OPTIMIZER_AND_PARAMETERS, "vocab_parallel", BUDGETS_MB[0])
    cluster, run = prediction.cluster, prediction.run
    for nodes in range(cluster.nodes + 1, MAX_GPUS // cluster.per_node + 1):
        ranks = nodes * cluster.per_node
        rows = run.config.training.train_batch_size * run.sequence_parallel_size
        if rows % (ranks * micro_batch_size) or run.stats.vocab_size % ranks:
            continue
        if ranks % run.sequence_parallel_size or ranks % run.zero.hpz:
            continue
        larger = Prediction(replace(run, ranks=ranks), Cluster(nodes, cluster.per_node, cluster.device))
        other = smallest.apply(larger)
        if other.fits:
            return f"--nodes {nodes}, with the settings that need the least memory", other
    return None


def _format(value: object) -> str:
    """Format the value of a setting as in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _candidates(prediction: Prediction) -> Iterator[tuple[TunableSettings, Prediction]]:
    for values in product(*candidate_values(prediction).values()):
        settings = TunableSettings(*values)
        yield settings, settings.apply(prediction)


def suggest(prediction: Prediction) -> tuple[TunableSettings, Prediction] | None:
    """Find the fastest settings that fit.

    Among the settings within 1 % of the fastest, return those that are fastest without overlap.

    Returns:
        The settings and their prediction, or None if no settings fit.
    """
    fitting = [(settings, other) for settings, other in _candidates(prediction) if other.fits]
    if not fitting:
        return None
    best = min(other.time.overlapped for _, other in fitting)
    near = [item for item in fitting if item[1].time.overlapped <= 1.01 * best]
    return min(near, key=lambda item: (item[1].time.serial, item[1].memory.peak))


def reasons(settings: TunableSettings, prediction: Prediction) -> list[tuple[str, str, str]]:
    """Return (key, value, effects) for each setting: the effects of changing only this setting to other values."""
    rows = []
    for name, values in candidate_values(prediction).items():
        effects = []
        for value in values:
            if value == getattr(settings, name):
                continue
            other = replace(settings, **{name: value}).apply(prediction)
            if other.fits:
                effects.append(f"{_format(value)}: {other.time.overlapped / prediction.time.overlapped:.2f} x the time")
            else:
                host = f", {other.host_bytes / GIB:.0f} GiB of CPU memory per node" if other.host_bytes else ""
                effects.append(f"{_format(value)}: does not fit ({other.memory.peak / GIB:.1f} GiB{host})")
        rows.append((SETTING_LABELS[name], _format(getattr(settings, name)), "; ".join(effects)))
    return rows
