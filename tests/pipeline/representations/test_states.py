"""Pooled states against a plain forward pass of each single record with the family's own head, and the command."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.records import Record
from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.common.errors import UserError
from pipeline.representations import states
from pipeline.representations.__main__ import choose_layers, default_positions
from pipeline.representations.baseline import differences_from
from pipeline.representations.inputs import ParallelRecords, own_answers, read_parallel_records
from pipeline.representations.metrics import representation_metrics
from pipeline.representations.states import encode, pooled_states, select_positions
from tests.runs import TINY, python, refuses


def build(family, **fields):
    torch.manual_seed(0)
    fields = {**TINY, "vocab_size": 600, "initializer_range": 0.3, **fields, "model_type": family}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    return model.eval()


def reference_states(model, ids, positions):
    """Run one record, with full logits from the model's own head, and average over the positions."""
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_hidden_states=True)
        normed = output.hidden_states[-1][0]
        soft = torch.softmax(output.logits[0].double(), -1) @ model.get_input_embeddings().weight.double()
        states = {f"layer_{i}": h[0] for i, h in enumerate(output.hidden_states[:-1])}
    states |= {"final": normed, "soft_tokens": soft}
    return {name: rows[positions].double().mean(0).numpy() for name, rows in states.items()}


@pytest.mark.parametrize(
    ("family", "fields"),
    [("qwen3", {}), ("llama", {"tie_word_embeddings": False}), ("gemma2", {}), ("granite", {"logits_scaling": 4.0})],
)
def test_pooled_states_equal_single_record(family, fields, monkeypatch):
    model, generator = build(family, **fields), np.random.default_rng(0)
    encoded = []
    for length in (9, 4, 17, 12, 7):
        ids = generator.integers(0, 600, length).tolist()
        encoded.append((ids, list(range(length // 2, length - 1))))
    monkeypatch.setattr(states, "CHUNK_ELEMENTS", 600 * 3)  # logits of three positions at a time
    pooled = pooled_states(model, encoded, [0, 1, 2], batch_size=2)
    assert set(pooled) == {"layer_0", "layer_1", "layer_2", "final", "soft_tokens"}
    for i, (ids, positions) in enumerate(encoded):
        for name, expected in reference_states(model, ids, positions).items():
            np.testing.assert_allclose(pooled[name][i], expected, rtol=2e-4, atol=2e-6, err_msg=name)
    norm = model.get_decoder().norm
    one = [(ids, positions[:1]) for ids, positions in encoded]  # with one position, pooling and norm commute
    single = pooled_states(model, one, [2], batch_size=5)
    with torch.no_grad():
        normed = norm(torch.tensor(single["layer_2"])).numpy()
    np.testing.assert_allclose(single["final"], normed, rtol=2e-4, atol=2e-6)


def test_encode_response_positions_predict_response(prepared):
    tokenizer = load_tokenizer(prepared.tokenizer)
    messages = [{"role": "user", "content": "Tom has 3."}, {"role": "assistant", "content": "The answer is 7."}]
    ((ids, positions),) = encode(tokenizer, [Record("p", "en", messages, "7")])
    assert "The answer is 7." in tokenizer.decode([ids[position + 1] for position in positions])
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert ids[: len(prompt)] == prompt and positions[0] == len(prompt) - 1
    assert positions == list(range(positions[0], positions[-1] + 1))


def test_select_positions_of_prompts(prepared):
    """The question without what the template writes around it, and the last token before the response."""
    tokenizer = load_tokenizer(prepared.tokenizer)
    questions = ["Tom has 3.", "Ann has 4 pears?", "Zoe"]
    records = [
        Record("p", "en", [{"role": "user", "content": q}, {"role": "assistant", "content": "It is 7."}], None)
        for q in questions
    ]
    encoded = encode(tokenizer, records)
    assert select_positions(encoded, "answer") == encoded
    for (ids, at), question in zip(select_positions(encoded, "prompt"), questions, strict=True):
        assert tokenizer.decode([ids[position] for position in at]).strip() == question
    for (ids, at), (whole, positions) in zip(select_positions(encoded, "prompt_end"), encoded, strict=True):
        assert at == positions[:1] == [len(ids) - 1] and ids == whole[: len(ids)]
    records[0].messages[0]["content"] = ""
    with pytest.raises(UserError, match="a question is empty"):
        select_positions(encode(tokenizer, records), "prompt")
    assert default_positions(ParallelRecords(records[:1], ["en"], 0)) == ("answer",)


def test_own_answers_replace_answers_and_leave_out_missing(tmp_path):
    records = [record(str(i), lang) for lang in ("sw", "en") for i in range(7)]
    parallel = read_parallel_records(write(tmp_path / "x.jsonl", records), None)
    rows = [{**row, "output": f"own {row['pair_id']}{row['lang']}"} for row in records]
    rows[2]["output"] = "\u200b "
    rows.append({**rows[0], "output": "a second answer"})
    own = own_answers(parallel, write(tmp_path / "generations.jsonl", rows))
    assert own.pair_ids == [*"013456"] and own.languages == ["en", "sw"] and own.left_out == 1
    assert own.records[0].messages == [{"role": "user", "content": "q 0"}, {"role": "assistant", "content": "own 0en"}]
    assert own.records[6].messages[-1]["content"] == "own 0sw"
    for bad, message in (
        ([{"pair_id": "0"}], r"bad\.jsonl row 1: not a row of generations\.jsonl"),
        ([{**rows[0], "pair_id": "other"}], r"bad\.jsonl: no answer to a question of --data"),
        (rows[:5], r"bad\.jsonl: 0 questions exist in every language"),
    ):
        with pytest.raises(UserError, match=message):
            own_answers(parallel, write(tmp_path / "bad.jsonl", bad))
    with pytest.raises(UserError, match="no such file"):
        own_answers(parallel, tmp_path / "none.jsonl")


def test_baseline_gives_paired_differences(tmp_path):
    rng = np.random.default_rng(0)
    content = rng.normal(size=(20, 8))
    results = []
    for noise in (2.0, 0.5):
        points = np.concatenate([content + noise * rng.normal(size=content.shape) for _ in range(3)])
        metrics = representation_metrics({"final": points}, ["de", "en", "sw"], "en", set(), separated=False)
        common = {"position": "answer", "languages": ["de", "en", "sw"], "pair_ids": [*map(str, range(20))]}
        results.append({**common, "problems": 20, "representations": metrics})
    baseline, candidate = results
    (tmp_path / "representations.json").write_text(json.dumps(baseline))
    compared = differences_from(tmp_path, candidate)["differences"]["final"]
    for group, name in (("similarity", "debiased_cka"), ("similarity", "centred_cosine"), ("variance", "example")):
        values = [
            state[group][name] if group == "variance" else state[group]["all"][name]
            for state in (result["representations"]["final"] for result in results)
        ]
        low, high = compared[group][name]["interval"]
        assert compared[group][name]["value"] == pytest.approx(values[1]["value"] - values[0]["value"], abs=1e-5)
        assert 0 < low < compared[group][name]["value"] < high
    unequal = {**candidate, "pair_ids": [*map(str, range(1, 21))]}
    with pytest.raises(UserError, match=r"has another pair_ids; measure both models on the same data"):
        differences_from(tmp_path, unequal)
    for content, message in (("{}", "not a result of this version"), ("[", "not a result of this version")):
        (tmp_path / "representations.json").write_text(content)
        with pytest.raises(UserError, match=message):
            differences_from(tmp_path, candidate)
    with pytest.raises(UserError, match="No such file"):
        differences_from(tmp_path / "none.json", candidate)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def record(pair_id, lang):
    return {"pair_id": pair_id, "lang": lang, "question": f"q {pair_id}", "answer": "a"}


def test_read_parallel_records_only_complete_groups(tmp_path):
    records = [record(str(i), lang) for lang in ("sw", "en") for i in range(7) if (lang, i) != ("sw", 3)]
    parallel = read_parallel_records(write(tmp_path / "x.jsonl", records), None)
    assert (parallel.languages, parallel.left_out, parallel.pair_ids) == (["en", "sw"], 1, [*"012456"])
    assert [(r.lang, r.pair_id) for r in parallel.records] == [(lang, i) for lang in ("en", "sw") for i in "012456"]
    assert [r.pair_id for r in read_parallel_records(tmp_path / "x.jsonl", 5).records] == [*"01245"] * 2


def test_too_little_data_and_missing_layers_are_refused(tmp_path):
    write(tmp_path / "one.jsonl", [record("1", "en")])
    write(tmp_path / "few.jsonl", [record(str(i), lang) for i in range(9) for lang in ("en", "sw")[: 1 + (i < 2)]])
    for name, message in [("one", "only one language"), ("few", r"2 questions .* sw has the fewest records \(2\)")]:
        with pytest.raises(UserError, match=message):
            read_parallel_records(tmp_path / f"{name}.jsonl", None)
    with pytest.raises(UserError, match="--layers 5: the model has layers 0"):
        choose_layers(4, [1, 5])
    assert choose_layers(4, [1]) == [1, 4] and choose_layers(4, None) == [0, 1, 2, 3, 4]
    assert len(choose_layers(80, None)) == 9


@pytest.mark.slow
def test_command_writes_json_markdown_and_plot(prepared, tmp_path):
    tokenizer = load_tokenizer(prepared.tokenizer)
    model = build("qwen3", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    args = ["-m", "pipeline.representations", "--model", tmp_path / "model", "--output", tmp_path / "out"]
    generations = [json.loads(line) for line in prepared.data.read_text("utf-8").splitlines()]
    write(tmp_path / "g.jsonl", [{**row, "output": row["answer"]} for row in generations])
    done = python(*args, "--data", prepared.data, "--generations", tmp_path / "g.jsonl")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "representations.json").read_text())
    assert list(result["representations"]) == ["layer_0", "layer_1", "layer_2", "final", "soft_tokens"]
    assert result["problems"] == 12 and len(result["languages"]) == 8  # as many as the low-resource languages have
    assert list(result["other_positions"]) == ["prompt", "prompt_end", "own_answer"] and result["own_answers"] == 12
    assert "layer_0" not in result["other_positions"]["prompt_end"]
    own, answer = result["other_positions"]["own_answer"], result["representations"]  # the answers are the same here
    assert own["final"]["variance"] == answer["final"]["variance"]
    for metrics in result["representations"].values():
        assert all(0 <= metric["floor"] <= 1 for metric in metrics["similarity"]["all"].values())
        assert set(metrics["separability"]) == {"silhouette", "davies_bouldin", "kmeans_nmi", "probe", "probe_chance"}
    points = result["representations"]["final"]["scatter"]["points"]
    assert {len(rows) for rows in points.values()} == {12}
    table = (tmp_path / "out" / "representations.md").read_text()
    assert "| soft-token summaries |" in table and "**States at the last token of the prompt**" in table
    assert (tmp_path / "out" / "representations.png").read_bytes().startswith(b"\x89PNG")
    refuses(python(*args, "--data", prepared.data, "--layers", 3), "--layers 3", "0 (its embeddings) to 2")
