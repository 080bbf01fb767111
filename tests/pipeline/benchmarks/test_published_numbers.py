"""Numbers of docs/*.md against the files of docs/bench and the code that they quote."""

import csv
import re

import pytest

from pipeline.benchmarks.plan import case_named, compare
from pipeline.benchmarks.ranks import crossover_tokens
from pipeline.benchmarks.scale import point, published_model_stats, published_models
from pipeline.loss import LossSettings
from tests.runs import ROOT

ARMS = {
    "SOLAR": "solar",
    "weight 0": "weight 0",
    "attention by a mask": "mask",
    "hooks on every module": "modules",
    "throughput timer on": "timer",
    "plain DeepSpeed": "plain",
    "SOLAR with Liger's kernels": "liger",
}


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def rows_of(name: str) -> list[dict[str, str]]:
    with (ROOT / "docs" / "bench" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(name: str, head: str) -> list[list[str]]:
    """Return the cells of the table whose first line begins with `head`."""
    (text,) = re.findall(rf"^{re.escape(head)}[^\n]*\n\|[-:|]+\n((?:\|[^\n]*\n)+)", page(name), re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


@pytest.mark.parametrize(
    ("head", "columns", "micro_batches"), [("| shape | GPU | variant |", 3, "1"), ("| shape | variant |", 2, "4")]
)
def test_steps_on_one_gpu(head: str, columns: int, micro_batches: str) -> None:
    """Every measured step is in a table, and every row of a table is a measured step."""
    written = []
    shape = gpu = ""
    for first, *cells in table("performance", head):
        shape = first.partition(",")[0].lower() or shape
        gpu = (cells[0] if columns == 3 else "H100") or gpu
        variant, *numbers = cells[columns - 2 :]
        arm = "trl" if variant.startswith("TRL") else ARMS[variant]
        written.append((shape, gpu, arm, *(number.removesuffix(" %") for number in numbers)))
    expected = []
    for row in rows_of("gpu_steps"):
        if row["micro_batches"] == micro_batches:
            idle = f"{100 * float(row['idle']):.0f}" if row["idle"] else ""
            numbers = f"{1000 * float(row['step_s']) + 1e-6:.0f}", f"{100 * float(row['mfu']):.1f}", idle
            name = next(gpu for gpu in ("H100", "H200") if gpu in row["machine"])
            expected.append((row["model"], name, row["arm"], *numbers, f"{float(row['memory_gb']):.1f}"))
    assert sorted(written) == sorted(expected), sorted(set(written) ^ set(expected))


def test_gain_of_ligers_kernels() -> None:
    (ratio,) = re.findall(r"four layers of the 7B shape took ([\d.]+) of the time without it", page("training"))
    rows = [row for row in rows_of("gpu_steps") if row["model"] == "qwen2.5-7b" and row["micro_batches"] == "4"]
    seconds = {row["arm"]: float(row["step_s"]) for row in rows}
    assert float(ratio) == round(seconds["liger"] / seconds["solar"], 2)


def test_predicted_scaling() -> None:
    cells = {(row["model"], row["way"], row["gpus"]): row for row in rows_of("scale") if row["mode"] == "weak"}
    gpus, model = ("16", "64", "128", "256", "512", "1024"), ""
    for first, way, *numbers in table("scaling", "| | head | 16 |"):
        model = first or model
        for count, number in zip(gpus, numbers, strict=True):
            value = cells[model, way.replace(" ", "_"), count]["tokens_per_s_per_gpu"]
            assert number == (f"{float(value):,.0f}" if value else "does not fit"), (model, way, count)


@pytest.mark.parametrize("way", ["auto", "vocab_parallel", "full_logits"])
def test_predicted_scaling_is_that_of_the_planner(way: str) -> None:
    name = "Qwen2.5-0.5B"
    found = point(name, published_model_stats(published_models()[name]), "weak", 128, way, "h100")
    (row,) = (r for r in rows_of("scale") if (r["model"], r["mode"], r["gpus"], r["way"]) == (name, "weak", "128", way))
    assert {key: str(value) for key, value in found.items()} == row


def test_host_time() -> None:
    for head, names in (
        ("| ranks | exchange,", ["exchange_ms", "schedule_ms", "sequence_tables_ms"]),
        ("| ranks | gather |", ["gather_ms", "gather_deepspeed_ms", "reduce_ms", "reduce_deepspeed_ms"]),
    ):
        for row, (ranks, *cells) in zip(rows_of("host_time"), table("scaling", head), strict=True):
            assert ranks.replace(",", "") == row["ranks"]
            assert [float(cell) for cell in cells[: len(names)]] == [round(float(row[name]), 2) for name in names]


def test_planned_columns_of_the_comparison_with_real_steps_are_those_of_the_planner() -> None:
    """On two and eight ranks. Step times are planned with constants that are fitted to all rows, and not checked."""
    for row in rows_of("plan"):
        if row["ranks"] in ("2", "8"):
            measurements = {"calls": int(row["calls"]), "timings": {}}
            for key, column in (("bytes", "received_mb"), ("states", "states_mb"), ("peak", "peak_mb")):
                measurements[key] = 1e6 * float(row[column])
            found = compare(case_named(row["case"]), int(row["ranks"]), measurements)
            planned = {key for key in found if key.startswith("planned_")}
            assert planned == {"planned_received_mb", "planned_calls", "planned_states_mb", "planned_peak_mb"}
            assert {key: str(found[key]) for key in planned} == {key: row[key] for key in planned}, row


def test_crossover_of_the_heads() -> None:
    (found,) = re.findall(
        r"crossover at (\d+) target tokens per\s+rank on 4 ranks, and at (\d+) on 2", page("performance")
    )
    assert found == (str(crossover_tokens(4)), str(crossover_tokens(2)))


def test_passes_over_the_logits() -> None:
    passes = re.findall(r"passes: (\d) over the logits \((\d) with top_k: null, (\d) with hard tokens", page("scaling"))
    settings = (LossSettings(), LossSettings(top_k=None), LossSettings(pooling_tokens="hard"))
    assert passes == [tuple(str(each.logit_passes) for each in settings)]
