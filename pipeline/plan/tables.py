"""A plan on the screen."""

from rich.table import Table

from pipeline.plan.memory import Memory
from pipeline.plan.prediction import GIB, Plan
from pipeline.plan.traffic import transfers
from pipeline.plan.workload import Run


def memory_table(run: Run, memory: Memory) -> Table:
    """What one rank holds, by name."""
    table = Table("memory of a rank", "GiB")
    table.columns[1].justify = "right"
    for name, size in memory.states.items():
        table.add_row(name, f"{size / GIB:.2f}")
    for phase, parts in (("loss", memory.loss), ("layers", memory.layers), ("step", memory.step)):
        table.add_section()
        for name, size in parts.items():
            if size:
                table.add_row(f"in the {phase}: {name}", f"{size / GIB:.2f}")
    table.add_section()
    for on in (False, True):
        kept = run.activations.kept(len(run.facts.layers), on)
        table.add_row(f"activations {'with' if on else 'without'} checkpointing", f"{kept / GIB:.2f}")
    for name, size in memory.host.items():
        table.add_row(f"in the host's memory: {name}", f"{size / GIB:.2f}")
    table.add_section()
    table.add_row(f"peak (in the {memory.peak_phase})", f"{memory.peak / GIB:.2f}", style="bold")
    return table


def traffic_table(run: Run, per_node: int, seconds: dict[str, float] | None = None) -> Table:
    """What one rank receives in an optimizer step, by purpose; with `seconds`, how long that takes."""
    table = Table("a rank receives in a step", "GB", "from other nodes, GB", *(["ms"] if seconds else []))
    for column in table.columns[1:]:
        column.justify = "right"
    for t in transfers(run):
        outside = t.between_nodes(run.ranks, per_node)
        time = [f"{seconds[t.name] * 1e3:.1f}"] if seconds else []
        table.add_row(t.name, f"{t.received / 1e9:.3f}", f"{outside / 1e9:.3f}", *time)
    ways = {head: getattr(run.loss_traffic, head) for head in ("vocab_parallel", "gathered")}
    said = ", ".join(f"{head} {run.accumulation * size / 1e9:.3f} GB" for head, size in ways.items())
    table.caption = f"the loss by way: {said}"
    return table


def time_table(plan: Plan) -> Table:
    table = Table("a step", "")
    table.columns[1].justify = "right"
    time = plan.time
    for name, value in time.compute.items():
        label = f"{name}, computing" if name != "host" else "host's work beside the layers"
        table.add_row(label, f"{value * 1e3:.1f} ms")
    table.add_section()
    table.add_row("without overlap", f"{time.serial:.3f} s")
    table.add_row("with overlap", f"{time.overlapped:.3f} s")
    table.add_row("arithmetic of a rank", f"{plan.flops.total * plan.run.accumulation / 1e12:.1f} TFLOP")
    table.add_row("tokens per second", f"{plan.tokens_per_second:,.0f}")
    table.add_row("MFU (6 x parameters x tokens)", f"{100 * plan.mfu:.1f} %")
    table.add_row(f"the recipe's {plan.run.max_steps:,} steps", f"{plan.hours:.2f} h")
    return table
