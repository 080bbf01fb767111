"""Generations logged by any number of ranks are read back, after a kill too, unless the inputs have changed."""

from contextlib import suppress

import pytest

from pipeline.common.errors import UserError
from pipeline.evaluation.progress import Generation, GenerationLog

INPUTS = {"settings": {"batch_size": 2}, "model": [["model.safetensors", 10, 1]]}


def test_generation_log_merges_ranks_and_skips_cut_line(tmp_path, monkeypatch):
    answers = {0: Generation("línea\u2028 \ud800", True), 3: Generation("", False), 7: Generation("7", True)}
    for rank, indices in {0: [0, 3], 1: [7]}.items():
        monkeypatch.setenv("RANK", str(rank))
        GenerationLog(tmp_path, INPUTS).add({i: answers[i] for i in indices})
    with open(tmp_path / "generations.partial" / "rank-1.jsonl", "a") as file:
        file.write('[8, "cut sho')

    monkeypatch.setenv("RANK", "0")
    log = GenerationLog(tmp_path, INPUTS)
    assert log.generations == answers
    log.add({8: Generation("8", True)})
    assert GenerationLog(tmp_path, INPUTS).generations == answers | {8: Generation("8", True)}


def test_generation_log_sets_other_inputs_aside(tmp_path, capsys):
    GenerationLog(tmp_path, INPUTS).add({0: Generation("0", True)})
    assert capsys.readouterr().out == ""
    for model in ([], [1]):
        log = GenerationLog(tmp_path, {**INPUTS, "model": model})
        assert log.generations == {}
        log.add({0: Generation(f"{model}", True)})
    assert capsys.readouterr().out.count("generations.partial.old") == 2
    log.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["generations.partial.old"]
    assert "[]" in (tmp_path / "generations.partial.old" / "rank-0.jsonl").read_text()


def test_generation_log_without_generations_does_not_replace_one_that_was_set_aside(tmp_path):
    """An evaluation with a mistyped option is stopped before its first batch, and the right one started again."""
    GenerationLog(tmp_path, INPUTS).add({0: Generation("0", True)})
    GenerationLog(tmp_path, {**INPUTS, "model": []})
    assert GenerationLog(tmp_path, INPUTS).generations == {}
    old = tmp_path / "generations.partial.old"
    assert [file.read_text() for file in old.glob("rank-*")] == ['[0, "0", true, null, null]\n']
    old.rename(tmp_path / "kept")
    assert GenerationLog(tmp_path, {**INPUTS, "model": []}).generations == {} and not old.exists()


def test_generation_log_reports_full_disk(tmp_path):
    log = GenerationLog(tmp_path, INPUTS)
    log._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UserError, match=r"generations.partial: No space left on device; free disk space and restart"):
        log.add({0: Generation("0", True)})
    with suppress(OSError):  # what the failed write has left in the buffer
        log._file.close()
