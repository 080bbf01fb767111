"""Two models compared: McNemar against scipy, intervals against repeated experiments and theory, and the command."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from pipeline.common.errors import UserError
from pipeline.compare import bootstrap, compare_matrices, compare_runs, comparison_table, mcnemar, read_generations
from tests.runs import python, refuses


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (5, 5), (12, 3), (3, 12), (40, 61), (900, 1000)])
def test_mcnemar_is_the_binomial_test_of_the_discordant(gained, lost):
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-9)


def test_bootstrap_interval_is_the_normal_one_for_many_problems():
    rng = np.random.default_rng(3)
    differences = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=(2000, 1))
    low, high, mean_low, mean_high = bootstrap(differences)
    half = norm.ppf(0.975) * differences.std() / np.sqrt(2000)
    assert (low[0], high[0]) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.002)
    assert (mean_low, mean_high) == (low[0], high[0])


def test_problems_stay_together_in_the_bootstrap():
    """Ten copies of one language tell no more than one: the interval of their mean must not shrink."""
    column = np.random.default_rng(4).choice([-1.0, 0.0, 1.0], size=(100, 1))
    copies = bootstrap(np.tile(column, (1, 10)))
    assert copies[2:] == pytest.approx(bootstrap(column)[2:])
    apart = np.random.default_rng(5).choice([-1.0, 0.0, 1.0], size=(100, 10))
    _, _, low, high = bootstrap(apart)
    assert high - low < 0.5 * (copies[3] - copies[2])


def test_absent_records_do_not_count():
    baseline, candidate = np.array([[1.0, 0.0], [0.0, np.nan], [1.0, 1.0]]), np.array([[1, 1], [1, np.nan], [0, 1.0]])
    found = compare_matrices(baseline, candidate, ["en", "sw"])
    english, swahili = found["languages"]["en"], found["languages"]["sw"]
    assert (english["n"], english["gained"], english["lost"], english["difference"]) == (3, 1, 1, 0)
    assert (swahili["n"], swahili["baseline"], swahili["candidate"], swahili["gained"]) == (2, 0.5, 1.0, 1)
    assert found["mean"]["difference"] == pytest.approx(0.25)
    assert 0 <= swahili["low"] <= 0.5 <= swahili["high"] <= 1


def write_run(path, right, golds=None, separator=" "):
    path.mkdir(parents=True)
    rows = [
        {
            "pair_id": pair_id,
            "lang": lang,
            "output": f"a{separator}b",
            "answer": "1",
            "gold": (golds or {}).get(pair_id, "1"),
        }
        | {"correct": correct}
        for (pair_id, lang), correct in right.items()
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (path / "generations.jsonl").write_text(text, encoding="utf-8")
    return path


def test_runs_are_paired_by_problem_and_language(tmp_path):
    right = {(str(i), lang): i % 2 == 0 for i in range(6) for lang in ("en", "sw")}
    one = write_run(tmp_path / "one", right, separator="\u2028")  # a line separator within an output is no new row
    better = {key: value or key == ("1", "sw") for key, value in reversed(right.items()) if key != ("5", "en")}
    two = write_run(tmp_path / "two", better)
    found = compare_runs(one, two / "generations.jsonl")
    assert (found["records"], found["left_out"]) == (11, 1)
    assert found["languages"]["sw"] | {"low": 0, "high": 0} == {
        "n": 6,
        "baseline": 0.5,
        "candidate": pytest.approx(4 / 6),
        "difference": pytest.approx(1 / 6),
        "low": 0,
        "high": 0,
        "gained": 1,
        "lost": 0,
        "mcnemar_p": 1.0,
    }
    assert found["languages"]["en"]["difference"] == 0
    assert "| sw | 6 | 50.0 | 66.7 | +16.7 | " in comparison_table(found)


def test_runs_that_do_not_belong_together_are_one_line(tmp_path):
    one = write_run(tmp_path / "one", {("a", "en"): True})
    with pytest.raises(UserError, match="no record in common"):
        compare_runs(one, write_run(tmp_path / "two", {("b", "en"): True}))
    with pytest.raises(UserError, match="pair_id 'a', en: another gold"):
        compare_runs(one, write_run(tmp_path / "three", {("a", "en"): True}, golds={"a": "2"}))
    for content, message in [
        ("", "empty file"),
        ('{"pair_id": 1}\n', "row 1: not a row"),
        ("[1]\n", "row 1: not a row"),
    ]:
        (tmp_path / "x.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            read_generations(tmp_path / "x.jsonl")


def test_the_command_writes_json_and_markdown(tmp_path):
    right = {(str(i), lang): i % 3 == 0 for i in range(9) for lang in ("en", "sw")}
    one, two = write_run(tmp_path / "one", right), write_run(tmp_path / "two", dict.fromkeys(right, True))
    words = ["-m", "pipeline.compare", "--baseline", one, "--output", tmp_path / "out", "--candidate"]
    done = python(*words, two)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["mean"]["difference"] == pytest.approx(2 / 3)
    assert comparison_table(found) in (tmp_path / "out" / "comparison.md").read_text()
    refuses(python(*words, tmp_path / "none"), "none: no such file")
