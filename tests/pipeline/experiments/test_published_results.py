"""The tables of docs/results.md against the published values per seed."""

import re
from statistics import fmean

import pytest

from pipeline.experiments.analysis import PRIMARY, Results, run_comparisons
from pipeline.experiments.gains_by_world import gains, mean_and_interval, read_values
from pipeline.experiments.plan import read_experiment_plan
from pipeline.experiments.results import accuracy_table, primary_table
from tests.runs import ROOT

BLOCKS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split("\n\n")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
ROUNDING = 0.1001  # the program that formatted the tables had more digits than the files


def same(line: str, expected: str) -> bool:
    """Return whether two lines are equal except for the rounding of their numbers."""
    numbers = zip(NUMBER.findall(line), NUMBER.findall(expected), strict=False)
    text = NUMBER.sub("#", line) == NUMBER.sub("#", expected)
    return text and all(abs(float(a) - float(b)) <= (ROUNDING if "." in a else 0) for a, b in numbers)


def find(table: str) -> int:
    """Return the index of the block after a table, which must follow the line above it in the document."""
    above, rows, *more = table.split("\n\n")
    starts = [i for i, block in enumerate(BLOCKS) if " ".join(block.split()) == above]
    for start in starts:
        written = BLOCKS[start + 1].splitlines()
        if len(written) == len(rows.splitlines()) and all(map(same, written, rows.splitlines())):
            assert [BLOCKS[start + 2]] == more or not (more or BLOCKS[start + 2].startswith("Sanity check")), above
            return start + 2 + len(more)
    raise AssertionError(f"docs/results.md lacks this table:\n{table}")


def check_values_by_seed(block: int, results: Results, world: str) -> None:
    """Check the table of held-out combinations by seed that begins at a block, if one does."""
    if BLOCKS[block] != "Held-out combinations by seed, in percent:":
        return
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in BLOCKS[block + 1].splitlines())
    for variant, *cells in rows:
        models = results[variant, world]
        for seed, cell in zip(map(int, head[1:]), cells, strict=True):
            assert (not cell) == (seed not in models), (world, variant, seed)
            assert not cell or abs(int(cell) - 100 * models[seed][PRIMARY]) < 0.51, (world, variant, seed)


@pytest.mark.parametrize("name", ["plan", "worlds", "embedding_rate", "stems", "control"])
def test_tables_are_those_of_the_published_values(name: str) -> None:
    plan = read_experiment_plan(ROOT / "pipeline" / "experiments" / f"{name}.yaml")
    results = read_values([ROOT / "docs" / "bench" / f"{'experiment' if name == 'plan' else name}.csv"])
    comparisons = run_comparisons(plan, results)
    find(primary_table(comparisons))
    worlds = [world for world in plan.worlds if any(block.startswith(f"World {world}:") for block in BLOCKS)]
    assert worlds
    for world in worlds:
        check_values_by_seed(find(accuracy_table(plan, results, comparisons, world)), results, world)


def test_worlds_of_few_seeds_have_the_published_values() -> None:
    results = read_values([ROOT / "docs" / "bench" / f"{name}.csv" for name in ("worlds", "stems")])
    (table,) = (block for block in BLOCKS if block.startswith("| world | seeds | sft | paper | hard | words | foreign"))
    variants = ("sft", "paper", "hard", "words")
    for line in table.splitlines()[2:]:
        name, seeds, *accuracies, foreign = (cell.strip() for cell in line.strip("|").split("|"))
        world = name.split("`")[1]
        for variant, accuracy, words in zip(variants, accuracies, foreign.split(";"), strict=True):
            models = results[variant, world]
            assert [int(seed) for seed in seeds.split(",")] == list(models), world
            for measure, cell, error in ((PRIMARY, accuracy, 0.51), ("confusion", words, 0.051)):
                expected = [100 * model[measure] for model in models.values()]
                written = [float(value) for value in cell.split(",")]
                assert written == pytest.approx(expected, abs=error), (world, variant, measure)


def test_gains_of_words_with_tied_embeddings() -> None:
    """docs/training.md quotes three gains and compares two of them on the same seeds."""
    results = read_values([ROOT / "docs" / "bench" / f"{name}.csv" for name in ("experiment", "worlds")])
    text = " ".join((ROOT / "docs" / "training.md").read_text(encoding="utf-8").split())
    tied, untied = (gains(results, "words", world) for world in ("tied", "main"))
    for world, values in (("tied", tied), ("tied_subwords", gains(results, "words", "tied_subwords"))):
        found = mean_and_interval([*values.values()])
        interval = f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"
        assert interval in text.replace(" points [", " ["), world
    assert f"and {fmean(untied[seed] for seed in tied):+.1f} on the same seeds" in text
