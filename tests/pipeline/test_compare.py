"""Two runs compared on the records that they have in common, and the command."""

import json

import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.compare import (
    compare_matrices,
    compare_runs,
    comparison_table,
    primary_sentence,
    settings_warning,
    verdict,
    write_comparison,
)
from pipeline.evaluation.results_reader import read_generations
from tests.runs import python, refuses


def test_compare_matrices_ignores_absent_records():
    baseline, candidate = np.array([[1.0, 0.0], [0.0, np.nan], [1.0, 1.0]]), np.array([[1, 1], [1, np.nan], [0, 1.0]])
    result = compare_matrices(baseline[None], candidate[None], ["en", "sw"])
    english, swahili = result["languages"]["en"], result["languages"]["sw"]
    assert (english["n"], english["gained"], english["lost"], english["difference"]) == (3, 1, 1, 0)
    assert (swahili["n"], swahili["baseline"], swahili["candidate"], swahili["gained"]) == (2, 0.5, 1.0, 1)
    assert result["mean"]["difference"] == pytest.approx(0.25)
    assert 0 <= swahili["low"] <= 0.5 <= swahili["high"] <= 1


def write_run(path, correct, golds=None, separator=" ", dtype="bfloat16", seed=None, settings=None):
    path.mkdir(parents=True)
    rows = [
        {
            "pair_id": pair_id,
            "lang": lang,
            "output": f"a{separator}b",
            "answer": "1",
            "gold": (golds or {}).get(pair_id, "1"),
            "finished": lang == "en",
        }
        | {"correct": is_correct}
        for (pair_id, lang), is_correct in correct.items()
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (path / "generations.jsonl").write_text(text, encoding="utf-8")
    (path / "evaluation.json").write_text(json.dumps({"model": {"dtype": dtype}, "settings": settings or {}}))
    if seed is not None:
        (path / "config.yaml").write_text(f"seed: {seed}\n")
    return path


def test_compare_runs_pairs_by_pair_id_and_language(tmp_path):
    correct = {(str(i), lang): i % 2 == 0 for i in range(6) for lang in ("en", "sw")}
    one = write_run(tmp_path / "one", correct, separator="\u2028")  # a line separator in an output is not a new row
    better = {key: value or key == ("1", "sw") for key, value in reversed(correct.items()) if key != ("5", "en")}
    two = write_run(tmp_path / "two", better)
    result = compare_runs(one, two / "generations.jsonl")
    assert (result["records"], result["left_out"]) == (11, 1)
    assert result["languages"]["sw"] | {"low": 0, "high": 0} == {
        "n": 6,
        "baseline": 0.5,
        "candidate": pytest.approx(4 / 6),
        "difference": pytest.approx(1 / 6),
        "low": 0,
        "high": 0,
        "gained": 1,
        "lost": 0,
        "mcnemar_p": 1.0,
        "p": 1.0,
        "p_holm": 1.0,
    }
    assert result["languages"]["en"]["difference"] == 0
    assert result["unfinished"] == {"en": [0, 0], "sw": [6, 6]} and result["dtype"] == "bfloat16"
    table = comparison_table(result)
    assert "| sw | 6 | 6, 6 | 50.0 | 66.7 | +16.7 | " in table and "| **mean of languages** | | 6, 6 |" in table


def test_compare_runs_pairs_seeds(tmp_path):
    rng = np.random.default_rng(0)
    keys = [(str(i), lang) for i in range(40) for lang in ("en", "sw", "te")]
    runs = {"sft": [], "solar": []}
    for name, rate in (("sft", 0.4), ("solar", 0.7)):
        for seed in (1, 2, 3):
            correct = {key: bool(rng.random() < rate) for key in keys}
            runs[name].append(write_run(tmp_path / f"{name}-{seed}", correct, seed=seed))
    result = compare_runs(runs["sft"], runs["solar"], ["sw", "te"])
    assert result["seeds"] == [1, 2, 3] and result["records"] == 120 and result["unfinished"]["sw"] == [120, 120]
    assert "mcnemar_p" not in result["languages"]["sw"]
    single = [compare_runs(*pair) for pair in zip(runs["sft"], runs["solar"], strict=True)]
    assert result["mean"]["by_seed"] == pytest.approx([one["mean"]["difference"] for one in single])
    assert result["mean"]["difference"] == pytest.approx(np.mean(result["mean"]["by_seed"]))
    primary, by_language = result["primary"], result["languages"]
    assert primary["measure"] == "sw, te" and primary["languages"] == ["sw", "te"]
    assert primary["difference"] == pytest.approx(np.mean([by_language[lang]["difference"] for lang in ("sw", "te")]))
    assert primary["low"] < 0.3 < primary["high"] and primary["p"] < 0.05
    assert "the mean of sw, te: +" in primary_sentence(result) and "By seed: +" in primary_sentence(result)
    assert ": higher beyond noise. The interval covers" in primary_sentence(result)
    assert verdict(by_language["sw"] | {"p_holm": 0.2}) == "higher before Holm's correction only"
    reverse = compare_runs(runs["solar"], runs["sft"])["mean"]
    assert verdict(reverse) == "lower beyond noise"
    assert verdict(reverse | {"high": 0.0}) == "no difference beyond noise"
    assert "| seed SD | p | Holm p |" in comparison_table(result)

    with pytest.raises(UserError, match="3 runs of the baseline but 2 of the candidate"):
        compare_runs(runs["sft"], runs["solar"][:2])
    with pytest.raises(UserError, match="solar-2: trained with seed 2, its baseline with 1; give the same order"):
        compare_runs(runs["sft"][:2], runs["solar"][1::-1])
    with pytest.raises(UserError, match="sft-1: the same seed as an earlier run"):
        compare_runs([runs["sft"][0]] * 2, [runs["solar"][0]] * 2)
    with pytest.raises(UserError, match="--primary: no language 'xx'; choose mean or from en, sw, te"):
        compare_runs(runs["sft"], runs["solar"], ["xx"])


def test_compare_runs_accepts_fractions_of_correct_answers(tmp_path):
    one = write_run(tmp_path / "one", {(str(i), "en"): i / 8 for i in range(8)})
    two = write_run(tmp_path / "two", {(str(i), "en"): (i + 1) / 8 for i in range(8)})
    result = compare_runs(one, two)
    entry = result["languages"]["en"]
    assert entry["difference"] == pytest.approx(1 / 8) and "mcnemar_p" not in entry and entry["p"] == 2**-7
    assert "| p | Holm p |" in comparison_table(result) and "McNemar" not in comparison_table(result)
    (two / "generations.jsonl").write_text((two / "generations.jsonl").read_text().replace("1.0", "1.5"))
    with pytest.raises(UserError, match="row 8: not a row"):
        compare_runs(one, two)
    (two / "generations.jsonl").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match=r"generations\.jsonl: not UTF-8"):
        compare_runs(one, two)


def test_compare_runs_counts_unfinished_samples(tmp_path):
    """One of four samples to each problem of the baseline is unfinished; the candidate has one sample."""
    one, two = (write_run(tmp_path / name, {(str(i), "en"): 0.25 for i in range(6)}) for name in ("one", "two"))
    rows = map(json.loads, (one / "generations.jsonl").read_text().splitlines())
    samples = {"finished": False, "samples": [{"finished": n > 0} for n in range(4)]}
    (one / "generations.jsonl").write_text("".join(json.dumps(row | samples) + "\n" for row in rows))
    result = compare_runs(one, two)
    assert (result["unfinished"], result["responses"]) == ({"en": [6, 0]}, [24, 6])
    text = write_comparison(result, tmp_path / "out")
    assert "Of the 24 and 6 responses, 6 of the baseline and 0 of the candidate are unfinished" in text


def test_compare_runs_names_different_settings(tmp_path):
    correct = {(str(i), "en"): i < 3 for i in range(6)}
    shots = {"few_shot": "shots.jsonl", "num_shots": 4}
    runs = [
        write_run(
            tmp_path / str(i), correct, settings={"max_new_tokens": 64, "num_shots": 8, "batch_size": i} | changes
        )
        for i, changes in enumerate(({}, {"num_shots": 4}, {"max_new_tokens": 2048}, shots))
    ]
    assert compare_runs(runs[0], runs[1])["different_settings"] == {}  # without few_shot, num_shots has no effect
    assert settings_warning(compare_runs(runs[0], runs[1])) == ""
    result = compare_runs(runs[0], runs[2])
    assert result["different_settings"] == {"max_new_tokens": [64, 2048]}
    assert "differ in max_new_tokens (64, 2048), so" in write_comparison(result, tmp_path / "out")
    assert list(compare_runs(runs[0], runs[3])["different_settings"]) == ["few_shot", "num_shots"]


def test_comparison_agrees_with_test_of_single_language(tmp_path):
    one = write_run(tmp_path / "one", {(str(i), "en"): i >= 5 for i in range(250)})
    two = write_run(tmp_path / "two", {(str(i), "en"): True for i in range(250)})
    result = compare_runs(one, two)
    entry = result["languages"]["en"]
    assert entry["low"] > 0 and entry["p"] == entry["p_holm"] == result["primary"]["p"] == 0.0625
    assert "p = 0.0625: higher by the interval, but not by the test." in primary_sentence(result)
    assert verdict(entry) == "higher by the interval, but not by the test"


def test_comparison_table_has_as_many_cells_as_headings(tmp_path):
    one = write_run(tmp_path / "one", {(str(i), lang): 0.0 for i in range(8) for lang in ("en", "yo")})
    two = write_run(
        tmp_path / "two", {(str(i), lang): (lang == "en") * i / 8 for i in range(8) for lang in ("en", "yo")}
    )
    table = comparison_table(compare_runs(one, two))
    assert len({line.count("|") for line in table.splitlines()}) == 1 and "McNemar" not in table


def test_compare_runs_refuses_different_dtypes(tmp_path):
    one = write_run(tmp_path / "one", {("a", "en"): True})
    two = write_run(tmp_path / "two", {("a", "en"): True}, dtype="float32")
    with pytest.raises(UserError, match=r"two: ran in float32, but .*one in bfloat16; evaluate both with the same"):
        compare_runs(one, two)
    (two / "evaluation.json").write_text('{"model": {"dtype": "unknown precision", "server": "http://localhost/v1"}}')
    with pytest.raises(UserError, match=r"two: ran in unknown precision, .* evaluate both by a server, or neither$"):
        compare_runs(one, two)
    (two / "evaluation.json").write_text('{"settings": {"dtype": "auto"}}')  # of an older version
    with pytest.raises(UserError, match=r"two/evaluation\.json: .*run pipeline\.evaluation again"):
        compare_runs(one, two)


def test_compare_runs_refuses_unrelated_runs(tmp_path):
    one = write_run(tmp_path / "one", {("a", "en"): True})
    with pytest.raises(UserError, match="no record in common"):
        compare_runs(one, write_run(tmp_path / "two", {("b", "en"): True}))
    with pytest.raises(UserError, match="pair_id 'a', en: a gold answer that differs from"):
        compare_runs(one, write_run(tmp_path / "three", {("a", "en"): True}, golds={"a": "2"}))
    for content, message in [
        ("", "empty file"),
        ('{"pair_id": 1}\n', "row 1: not a row"),
        ("[1]\n", "row 1: not a row"),
    ]:
        (tmp_path / "x.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            read_generations(tmp_path / "x.jsonl")


def test_command_writes_json_and_markdown(tmp_path):
    correct = {(str(i), lang): i % 3 == 0 for i in range(9) for lang in ("en", "sw")}
    one, two = write_run(tmp_path / "one", correct), write_run(tmp_path / "two", dict.fromkeys(correct, True))
    args = ["-m", "pipeline.compare", "--baseline", one, "--output", tmp_path / "out", "--candidate"]
    done = python(*args, two)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert result["mean"]["difference"] == pytest.approx(2 / 3)
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert lines[2].startswith(
        "Of the 18 responses of each model, 9 of the baseline and 9 of the candidate are unfinished"
    )
    assert lines[4].startswith("Primary measure, the mean of all languages: +66.7 points, ")
    assert lines[4].endswith("One seed: the interval covers the choice of problems, not that of the seed.")
    assert comparison_table(result).splitlines() == lines[6:]
    refuses(python(*args, tmp_path / "none"), "none: no such file")
