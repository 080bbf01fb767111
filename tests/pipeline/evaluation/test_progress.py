"""Finished generations: read back from any number of ranks, after a kill, and not where the evaluation is another."""

from pipeline.evaluation.progress import Finished, Generation

FACTS = {"settings": {"batch_size": 2}, "model": [["model.safetensors", 10, 1]]}


def test_what_earlier_ranks_finished_is_there_and_a_torn_line_is_not(tmp_path, monkeypatch):
    answers = {0: Generation("línea\u2028 \ud800", True), 3: Generation("", False), 7: Generation("7", True)}
    for rank, indices in {0: [0, 3], 1: [7]}.items():
        monkeypatch.setenv("RANK", str(rank))
        Finished(tmp_path, FACTS).add({i: answers[i] for i in indices})
    with open(tmp_path / "generations.partial" / "rank-1.jsonl", "a") as file:
        file.write('[8, "cut sho')

    monkeypatch.setenv("RANK", "0")
    again = Finished(tmp_path, FACTS)
    assert again.generations == answers
    assert again.has([0, 7]) and not again.has([7, 8])
    again.add({8: Generation("8", True)})
    assert Finished(tmp_path, FACTS).generations == answers | {8: Generation("8", True)}

    assert Finished(tmp_path, {**FACTS, "model": []}).generations == {}
    again.remove()
    assert not list(tmp_path.iterdir())
