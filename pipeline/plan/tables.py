"""Tables that show a prediction in the terminal."""

from rich.table import Table

from pipeline.plan.memory import MemoryEstimate
from pipeline.plan.prediction import GIB, Prediction
from pipeline.plan.traffic import estimate_transfers
from pipeline.plan.workload import PlannedRun

# Display names of entries whose JSON names must not change.
DISPLAY_NAMES = {
    "passing": "temporary tensors",
    "blocks": "blocks of the head",
    "sums": "scalar all-reduces",
}


def memory_table(run: PlannedRun, memory: MemoryEstimate) -> Table:
    """Build a table of the memory of one rank, by name."""
    table = Table("memory per rank", "GiB")
    table.columns[1].justify = "right"
    for name, size in memory.states.items():
        table.add_row(name, f"{size / GIB:.2f}")
    for phase, parts in (("loss", memory.loss), ("layers", memory.layers), ("step", memory.step)):
        table.add_section()
        for name, size in parts.items():
            if size:
                table.add_row(f"in the {phase}: {DISPLAY_NAMES.get(name, name)}", f"{size / GIB:.2f}")
    table.add_section()
    for on in (False, True):
        saved = run.activations.saved(len(run.stats.layers), on)
        table.add_row(f"activations {'with' if on else 'without'} checkpointing", f"{saved / GIB:.2f}")
    for name, size in memory.host.items():
        table.add_row(f"in CPU memory: {name}", f"{size / GIB:.2f}")
    table.add_section()
    table.add_row(f"peak (in the {memory.peak_phase})", f"{memory.peak / GIB:.2f}", style="bold")
    return table


def traffic_table(run: PlannedRun, per_node: int, seconds: dict[str, float] | None = None) -> Table:
    """Build a table of the bytes that a rank receives in an optimizer step, with their time if `seconds` is given."""
    table = Table("received per rank and step", "GB", "from other nodes, GB", *(["ms"] if seconds else []))
    for column in table.columns[1:]:
        column.justify = "right"
    for t in estimate_transfers(run):
        outside = t.between_nodes(run.ranks, per_node)
        time = [f"{seconds[t.name] * 1e3:.1f}"] if seconds else []
        table.add_row(DISPLAY_NAMES.get(t.name, t.name), f"{t.received / 1e9:.3f}", f"{outside / 1e9:.3f}", *time)
    by_head = {head: getattr(run.loss_traffic, head) for head in ("vocab_parallel", "gathered")}
    sizes = ", ".join(f"{head} {run.gradient_accumulation_steps * size / 1e9:.3f} GB" for head, size in by_head.items())
    table.caption = f"the loss by head: {sizes}"
    return table


def time_table(prediction: Prediction) -> Table:
    """Build a table of the step time by part, the throughput, the MFU and the duration of the run."""
    table = Table("optimizer step", "")
    table.columns[1].justify = "right"
    time, run = prediction.time, prediction.run
    for name, value in time.compute.items():
        label = f"{name}, computation" if name != "host" else "host, overlapping with the layers"
        table.add_row(label, f"{value * 1e3:.1f} ms")
    table.add_section()
    table.add_row("without overlap", f"{time.serial:.3f} s")
    table.add_row("with overlap", f"{time.overlapped:.3f} s")
    table.add_row("FLOPs per rank", f"{prediction.flops.total * run.gradient_accumulation_steps / 1e12:.1f} TFLOP")
    table.add_row("tokens per second", f"{prediction.tokens_per_second:,.0f}")
    table.add_row("MFU (6 x parameters x tokens)", f"{100 * prediction.mfu:.1f} %")
    table.add_row(f"the recipe's {run.max_steps:,} steps", f"{prediction.hours:.2f} h")
    return table
