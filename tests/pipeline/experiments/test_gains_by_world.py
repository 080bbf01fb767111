"""The comparison of worlds, from CSV files alone."""

from pathlib import Path

import pytest

from pipeline.common.errors import UserError
from pipeline.experiments.gains_by_world import compare, gains_table, plot_gains, read_values
from tests.runs import ROOT, python, refuses

HEADER = "seed,world,arm,measure,value\n"


def test_table_in_docs_is_that_of_the_published_values() -> None:
    """The table and the values per seed must not drift apart."""
    paths = [ROOT / "docs/bench" / name for name in ("experiment.csv", "worlds.csv", "embedding_rate.csv", "stems.csv")]
    assert gains_table(read_values(paths)) in (ROOT / "docs/results.md").read_text(encoding="utf-8")


def test_gains_by_hand(tmp_path: Path) -> None:
    """Two seeds have no interval. Three with gains of 10, 20 and 30 points have 20 +- 4.303 * 10 / sqrt(3)."""
    path, lines = tmp_path / "results.csv", []
    for world, seeds in (("small", (1, 2)), ("large", (1, 2, 3))):
        for seed in seeds:
            lines.append(f"{seed},{world},sft,low_unseen,0.1\n")
            lines.append(f"{seed},{world},hard,low_unseen,{0.1 + seed / 10}\n")
    lines += ["3,large,paper,low_unseen,0.05\n", "4,large,paper,low_unseen,0.9\n"]  # no sft with seed 4
    path.write_text(HEADER + "".join(lines))
    results = read_values([path])
    assert gains_table(results).splitlines()[2:] == [
        "| `small` | 2 | 10.0 |  | +15.0 |  |",
        "| `large` | 3 | 10.0 | -5.0 (1 of them) | +20.0 [-4.8, +44.8] |  |",
    ]
    assert plot_gains(results).startswith(b"\x89PNG")
    # With the seeds 1 and 2, both worlds gain 10 and 20 points. With the seed 3, paper loses 5 and hard gains 30.
    assert compare(results, "hard:large", "hard:small") == (
        "hard:large +15.0, hard:small +15.0, difference +0.0 (2 seeds: 1, 2)"
    )
    assert compare(results, "paper:large", "hard:large").startswith(
        "paper:large -5.0, hard:large +30.0, difference -35.0 (1"
    )
    with pytest.raises(UserError, match="no results of 'hard'; the files have sft:small, hard:small"):
        compare(results, "hard", "hard:small")
    with pytest.raises(UserError, match="paper:large and hard:small have no seed in common"):
        compare(results, "paper:large", "hard:small")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed,arm\n1,sft\n", "not a results.csv of an experiment: its first line is not seed,world,arm"),
        (HEADER + "x,main,sft,low_unseen,0.1\n", "not a results.csv of an experiment: invalid literal"),
        (HEADER, "not a results.csv of an experiment: no results of sft"),
        (HEADER + "1,main,sft,low,0.1\n", "not a results.csv of an experiment: a model without low_unseen"),
        (HEADER + "1,main,sft,low_unseen,nan\n", "seed 1, main, sft, low_unseen: twice, or not finite"),
        (HEADER + "1,main,sft,low_unseen,0.1\n" * 2, "seed 1, main, sft, low_unseen: twice, or not finite"),
    ],
)
def test_other_files(text: str, message: str, tmp_path: Path) -> None:
    """Name the file, and what is wrong with it."""
    path = tmp_path / "results.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=f"results.csv: .*{message}"):
        read_values([path])


def test_a_world_in_two_files(tmp_path: Path) -> None:
    """Its seeds would be mixed up."""
    path = tmp_path / "results.csv"
    path.write_text(HEADER + "1,main,sft,low_unseen,0.1\n")
    with pytest.raises(UserError, match="the world 'main' is in another file, too"):
        read_values([path, path])


def test_command(tmp_path: Path) -> None:
    """Print the table and write the picture. A missing file is refused, and no picture is written."""
    path, picture = tmp_path / "results.csv", tmp_path / "new" / "gains.png"
    command = ("-m", "pipeline.experiments.gains_by_world", path, "--output", picture)
    refuses(python(*command), f"cannot read {path}", "No such file", "give a results.csv")
    assert not picture.exists()
    path.write_text(HEADER + "1,main,sft,low_unseen,0.1\n1,main,hard,low_unseen,0.3\n")
    assert "| `main` | 1 | 10.0 |  | +20.0 |  |" in python(*command).stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
