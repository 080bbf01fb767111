"""Tasks of lm-evaluation-harness: on two ranks its outputs equal our own generation; its scores next to ours."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.common.errors import UserError
from pipeline.common.launcher import free_port
from pipeline.evaluation.answers.number import extract_answer
from pipeline.evaluation.dataset import read_examples
from pipeline.evaluation.generation import generate, load_for_generation
from pipeline.evaluation.lm_eval_tasks import (
    _distributed_class,
    build_model,
    build_parser,
    extract_rows,
    extraction_score,
    find_tasks,
    lm_eval_scores,
    lm_eval_table,
    task_language,
)
from tests.runs import ENVIRONMENT, ROOT, TINY


def sample(doc_id, response, target, filtered="strict"):
    return {"doc_id": doc_id, "target": target, "resps": [[response]], "filter": filtered}


def test_extract_rows_one_per_example():
    samples = [sample(i, text, "70000", name) for name in ("strict", "flexible") for i, text in enumerate(TEXTS)]
    rows = extract_rows("mine_de", samples)
    assert [(row["doc_id"], row["answer"], row["correct"]) for row in rows] == [(0, "70000", True), (1, None, False)]
    assert extraction_score(rows) | {"low": 0, "high": 1} == {"accuracy": 0.5, "low": 0, "high": 1}
    assert extract_rows("mine", samples) == [] and extract_rows("xcopa_de", [sample(0, "a", "the cause")]) == []
    assert extract_rows("mmlu_de", [{"doc_id": 0, "target": "1", "resps": [[(-1.5, False)]]}]) == []
    assert extraction_score([]) is None
    thinking = "<think>\\boxed{5}?</think>\nDie Antwort ist 70.000."
    assert extract_rows("mine_de", [sample(0, thinking, "70000")])[0]["answer"] == "70000"


TEXTS = ["Die Antwort ist 70.000.", "keine Zahl"]


@pytest.mark.parametrize(
    ("task", "lang"),
    [
        ("mgsm_native_cot_sw", "sw"),
        ("mgsm_en_cot_sw", "en"),
        ("mgsm_direct_zh", "zh"),
        ("mine-de", "de"),
        ("belebele_swh_Latn", "swh"),
        ("afrimgsm_cot_amh_prompt_1", "amh"),
        ("mgsm_native_cot_ha", "ha"),
        ("hendrycks_math_algebra", None),
        ("truthfulqa_is_hard", None),
        ("gsm8k", None),
    ],
)
def test_task_language_from_name(task, lang):
    assert task_language(task) == lang


def test_lm_eval_scores_intervals_only_for_proportions():
    metrics = {"alias": "x", "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1, "bleu,none": 12.5, "n": 3}
    scores = lm_eval_scores(metrics, 20)
    assert list(scores) == ["exact_match,strict", "bleu,none"]
    assert scores["exact_match,strict"]["low"] == pytest.approx(0.1119, abs=1e-4)
    assert scores["bleu,none"] == {"value": 12.5, "low": None, "high": None}
    task = {"n": 20, "lm_eval_compat": scores, "ours": {"accuracy": 0.3, "low": 0.1, "high": 0.5}}
    table = lm_eval_table({"tasks": {"mine_de": task, "other": {**task, "ours": None}}})
    assert "| mine_de | 20 | exact_match,strict | 25.0 % | 11.2 to 46.9 | 30.0 | 10.0 to 50.0 |" in table
    assert "|  |  | bleu,none | 12.5 | – |  |  |" in table
    assert "| other | 20 | exact_match,strict | 25.0 % | 11.2 to 46.9 | – | – to – |" in table


def test_find_tasks_without_lm_eval_names_the_package(monkeypatch):
    for name in ("lm_eval", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"lm-eval is not installed; .*`pip install lm-eval`"):
        find_tasks(["mgsm_direct_sw"], None)


def test_build_model_refuses_adapters(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    args = build_parser().parse_args(["--model", str(tmp_path), "--tasks", "mine_sw"])
    with pytest.raises(UserError, match=r"is an adapter; merge it into its base first \(pipeline\.export --merge\)$"):
        build_model(args)


def test_generate_until_also_stops_at_stop_strings():
    instance = pytest.importorskip("lm_eval.api.instance", reason="lm-eval is not installed (extra `evaluation`)")

    class Base:
        def generate_until(self, requests, disable_tqdm):
            return [request.args[1].get("until") for request in requests]

    def requests():
        options = ({"until": ["\n"]}, {"until": "Q:"}, {})
        return [instance.Instance("generate_until", {}, ("context", option), 0) for option in options]

    model = _distributed_class(Base)()
    assert model.generate_until(requests()) == [["\n"], "Q:", None]
    model.stop_strings = ["### End"]
    assert model.generate_until(requests()) == [["\n", "### End"], ["Q:", "### End"], ["### End"]]


@pytest.fixture
def tasks(prepared, tmp_path):
    """A model with random weights, and tasks with some of its own answers as golds, so that its score is known."""
    tokenizer = load_tokenizer(prepared.tokenizer)
    torch.manual_seed(0)
    fields = {**TINY, "vocab_size": len(tokenizer), "initializer_range": 0.3, "model_type": "qwen3"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    examples = [example for example in read_examples(prepared.data, limit=12) if example.lang in ("en", "es")]
    loaded, tokenizer = load_for_generation(tmp_path / "model", "float32")
    texts = [generation.text for generation in generate(loaded, tokenizer, examples, batch_size=5, max_new_tokens=24)]
    (yaml,) = re.findall(r"^```yaml\n(task: .*?)^```$", (ROOT / "docs/evaluation.md").read_text(), re.M | re.S)
    (tmp_path / "tasks").mkdir()
    outputs = {}
    for lang in ("en", "es"):
        indices = [i for i, example in enumerate(examples) if example.lang == lang]
        answers = [extract_answer(texts[i], lang) for i in indices]
        golds = [str(answer) if answer is not None and n % 3 else "-12345" for n, answer in enumerate(answers)]
        lines = [
            {"question": examples[i].messages[-1]["content"], "gold": g} for i, g in zip(indices, golds, strict=True)
        ]
        data = tmp_path / "tasks" / f"{lang}.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        changed = yaml.replace("mine_sw", f"mine_{lang}").replace("sw.jsonl", str(data))
        (tmp_path / "tasks" / f"mine_{lang}.yaml").write_text(changed)
        outputs[lang] = [
            (texts[i], gold != "-12345" and Decimal(gold) == answer)
            for i, gold, answer in zip(indices, golds, answers, strict=True)
        ]
    return Namespace(root=tmp_path, outputs=outputs)


def bare(number):
    """Remove punctuation, as the task's metric does."""
    return re.sub(r"\W", "", number)


def extract_as_task(text):
    """Return the last match of the task's own pattern."""
    matches = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return bare(next(filter(None, matches[-1]))) if matches else None


@pytest.mark.slow
def test_lm_eval_on_two_ranks_equals_own_generation(tasks):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `evaluation`)")
    root = tasks.root
    args = ["--model", root / "model", "--include_path", root / "tasks", "--output", root / "out", "--dtype", "float32"]
    args += ["--batch_size", 5, "--max_new_tokens", 24, "--tasks", "mine_en", "mine_es"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "pipeline.evaluation.lm_eval_tasks", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "HF_DATASETS_CACHE": str(root / "cache"), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in (root / "out" / "harness_generations.jsonl").read_text().split("\n") if line]
    result = json.loads((root / "out" / "harness.json").read_text())
    for lang, expected in tasks.outputs.items():
        assert [(row["output"], row["correct"]) for row in rows if row["lang"] == lang] == expected
        scores = result["tasks"][f"mine_{lang}"]
        golds = [str(json.loads(line)["gold"]) for line in (root / "tasks" / f"{lang}.jsonl").read_text().splitlines()]
        compatible = [extract_as_task(text) == bare(gold) for (text, _), gold in zip(expected, golds, strict=True)]
        exact_match = scores["lm_eval_compat"]["exact_match,flexible-extract"]
        assert exact_match["value"] == pytest.approx(sum(compatible) / len(compatible))
        assert scores["ours"]["accuracy"] == sum(correct for _, correct in expected) / len(expected)
        assert scores["n"] == len(expected)
    correct = [correct for expected in tasks.outputs.values() for _, correct in expected]
    assert 0 < sum(correct) < len(correct)
    assert lm_eval_table(result) in (root / "out" / "harness.md").read_text()


@pytest.mark.slow
def test_find_tasks_refuses_unknown_tasks(tmp_path, monkeypatch):
    manager = pytest.importorskip("lm_eval.tasks.manager", reason="lm-eval is not installed (extra `evaluation`)")
    # lm_eval indexes its tasks beside this file. Reading all 14,000 of them would take half a minute.
    monkeypatch.setattr(manager, "__file__", str(Path(manager.__file__).parent / "mgsm" / "manager.py"))
    with pytest.raises(UserError, match=r"--include_path .*none: no such directory"):
        find_tasks(["mine_sw"], str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"--tasks mgsm_direct_xx: no such task; similar tasks: .*mgsm_direct_"):
        find_tasks(["mgsm_direct_xx"], None)
    (tmp_path / "mine.yaml").write_text("task: mine_sw\ndataset_path: json\n")
    assert "mine_sw" in find_tasks(["mine_sw"], str(tmp_path)).task_index
