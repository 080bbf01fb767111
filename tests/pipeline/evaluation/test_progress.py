"""Generations logged by any number of ranks are read back, after a kill too, unless the inputs have changed."""

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


def test_generation_log_drops_other_inputs(tmp_path):
    GenerationLog(tmp_path, INPUTS).add({0: Generation("0", True)})
    log = GenerationLog(tmp_path, {**INPUTS, "model": []})
    assert log.generations == {}
    log.remove()
    assert not list(tmp_path.iterdir())
