"""The whole evaluation: unusable models are refused, and a signal or another checkpoint interrupts it."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.checkpoint.export_record import ExportRecord, write_export_record
from pipeline.common.atomic_io import write_json
from pipeline.common.errors import UserError
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL
from pipeline.evaluation.answers.number import extract_answer
from pipeline.evaluation.dataset import read_examples
from pipeline.evaluation.generation import encode_prompts, load_for_generation
from pipeline.evaluation.progress import find_evaluation
from pipeline.evaluation.runner import _model_identity, can_resume, evaluate
from pipeline.evaluation.settings import EvaluationSettings
from pipeline.fault_tolerance.signals import StopSignal
from tests.pipeline.evaluation.tiny_model import (
    TEMPLATE,
    make_model,
    make_records,
    make_tokenizer,
    save,
    write_records,
)
from tests.runs import ROOT


def test_evaluate_refuses_unusable_models(tmp_path, tokenizer):
    data = write_records(tmp_path / "x.jsonl", make_records()[:1])
    empty, no_weights = tmp_path / "empty", tmp_path / "no_weights"
    empty.mkdir()
    tokenizer.save_pretrained(no_weights)
    bare = make_tokenizer(["a b c"])
    bare.chat_template = None
    no_template = save(make_model(bare), bare, tmp_path / "bare")
    for model, message in [
        (tmp_path / "nowhere", "no such directory"),
        (empty, "cannot be loaded"),
        (no_weights, "cannot be loaded as a model"),
        (no_template, "no chat template"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            evaluate(EvaluationSettings(model=str(model), data=str(data), output=str(tmp_path / "out")))
        assert "\n" not in str(caught.value)
        assert str(model) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_evaluate_refuses_stale_export(tmp_path, random_model_dir):
    """The export of step 6 is refused once the run has a newer checkpoint, unless step 6 itself was asked for."""
    data = write_records(tmp_path / "x.jsonl", make_records()[:2])
    model = tmp_path / "run" / "hf"
    shutil.copytree(random_model_dir, model)
    record = ExportRecord("runs/x", 6, "id of 6", "fp32", "..", newest=True)
    settings = EvaluationSettings(str(model), str(data), str(tmp_path / "out"), max_new_tokens=4)
    write_export_record(model, record)
    for step in (6, 12):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir()
        write_json(tmp_path / "run" / f"checkpoint-{step}" / "COMPLETE", {"id": f"id of {step}", "files": {}})
        if step == 6:
            assert evaluate(settings) == 0
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match=r"hf: stale export of step 6, the run has checkpoint-12; .* --update$"):
        evaluate(settings)
    assert not (tmp_path / "out").exists()

    write_export_record(model, dataclasses.replace(record, newest=False))
    assert evaluate(settings) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["model"]["export"]["step"] == 6

    write_export_record(model, record)
    assert evaluate(dataclasses.replace(settings, allow_stale=True)) == 0

    write_export_record(model, dataclasses.replace(record, run_id="this"))
    for run_id, refused in (("this", True), ("other", False)):  # "other" has been put where the exported run was
        write_json(tmp_path / "run" / "checkpoint-12" / "trainer_state.json", {"run_id": run_id})
        if refused:
            with pytest.raises(UserError, match="stale export"):
                evaluate(settings)
        else:
            assert evaluate(settings) == 0


class StopAfterOneBatch:
    """Stand-in for `StopSignal`: the signal arrives during the first batch."""

    def __init__(self):
        self.checks = iter([False, True])

    @property
    def received(self):
        return next(self.checks)


def test_evaluate_resumes_with_export_of_earlier_checkpoint(tmp_path, random_model_dir, monkeypatch):
    """A checkpoint that is completed meanwhile makes the export stale for new evaluations only."""
    data = write_records(tmp_path / "x.jsonl", make_records()[:8])
    model = tmp_path / "run" / "hf"
    shutil.copytree(random_model_dir, model)
    record = ExportRecord("runs/x", 6, "id of 6", "fp32", "..", newest=True)
    write_export_record(model, record)
    settings = EvaluationSettings(str(model), str(data), str(tmp_path / "run"), batch_size=4, max_new_tokens=4)
    assert not can_resume(settings) and find_evaluation(model) is None
    logs = []

    def load(*args):
        logs.append(find_evaluation(model))
        return load_for_generation(*args)

    monkeypatch.setattr("pipeline.evaluation.runner.load_for_generation", load)
    assert evaluate(settings, StopAfterOneBatch()) == STOPPED_BY_SIGNAL
    assert find_evaluation(model) == tmp_path / "run" / "generations.partial" == logs[0]
    assert not (tmp_path / "run" / "generations.partial" / "loading.json").exists()
    for step in (6, 12):
        (tmp_path / "run" / f"checkpoint-{step}").mkdir()
        write_json(tmp_path / "run" / f"checkpoint-{step}" / "COMPLETE", {"id": f"id of {step}", "files": {}})
    assert can_resume(settings) and can_resume(dataclasses.replace(settings, allow_stale=True))
    moved = shutil.copy(data, tmp_path / "moved.jsonl")
    assert can_resume(dataclasses.replace(settings, pivot="de", data=str(moved)))
    shots = dataclasses.replace(settings, few_shot=str(data), num_shots=1)
    other = dataclasses.replace(settings, max_new_tokens=5)
    assert not can_resume(other) and not can_resume(shots)
    with pytest.raises(UserError, match="stale export of step 6"):
        evaluate(other)
    write_export_record(model, dataclasses.replace(record, checkpoint="id of 12", step=12))
    assert not can_resume(settings) and find_evaluation(model) is None  # the generations are not of this export
    write_export_record(model, record)
    assert evaluate(settings) == 0 and find_evaluation(model) is None
    with pytest.raises(UserError, match="stale export of step 6"):
        evaluate(settings)


def test_evaluate_counts_unfinished_and_records_model(tmp_path, random_model_dir, capsys):
    """A random model never ends a turn. Its last numbers are not answers, and the results begin with that."""
    model = Qwen2ForCausalLM.from_pretrained(random_model_dir, dtype=torch.bfloat16)
    save(model, load_tokenizer(random_model_dir, for_training=False), tmp_path / "model")
    data = write_records(tmp_path / "x.jsonl", make_records())
    assert evaluate(EvaluationSettings(str(tmp_path / "model"), str(data), str(tmp_path), max_new_tokens=4)) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    rows = [
        json.loads(line) for line in (tmp_path / "generations.jsonl").read_text(encoding="utf-8").split("\n") if line
    ]
    unfinished = sum(not row["finished"] for row in rows)
    assert next(iter(result.items())) == ("unfinished", unfinished) and unfinished > 9
    assert sum(score["unfinished"] for score in result["languages"].values()) == unfinished
    cut = [row for row in rows if not row["finished"]]
    assert any(extract_answer(row["output"], row["lang"]) is not None for row in cut)
    assert all(row["answer"] is None and not row["correct"] for row in cut)
    assert all(row["tokens"] == 4 and row["read_by"] == "none" and row["answer_type"] == "number" for row in cut)
    assert result["truncation"]["bn"]["unfinished"] == result["languages"]["bn"]["unfinished"]
    assert result["truncation"]["bn"]["tokens_per_response"] <= 4
    assert result["readings"]["bn"]["rules"] == "rules of bn"
    assert sum(result["readings"]["bn"]["read_by"].values()) == 6
    sentence = (tmp_path / "evaluation.md").read_text().splitlines()[2]
    assert sentence.startswith(f"{unfinished} of 18 responses are unfinished, cut at 4 tokens: bn ")
    assert sentence.endswith("The model ran in bfloat16.")
    assert capsys.readouterr().out.splitlines()[-1].startswith("warning: ")
    assert result["model"]["dtype"] == "bfloat16" and result["settings"]["dtype"] == "auto"
    assert result["model"]["export"] is None and len(result["model"]["fingerprint"]) == 64


def test_evaluate_passes_template_variables(tmp_path, random_model_dir, tokenizer):
    data = write_records(tmp_path / "x.jsonl", make_records()[:3])
    switched = make_tokenizer([r["question"] for r in make_records()])
    switched.chat_template = TEMPLATE + "{% if not enable_thinking %}no thoughts{% endif %}"
    prompts = encode_prompts(switched, read_examples(data), {"enable_thinking": False})
    assert all(switched.decode(prompt).endswith("no thoughts") for prompt in prompts)
    assert prompts != encode_prompts(switched, read_examples(data), {"enable_thinking": True})

    shutil.copytree(random_model_dir, tmp_path / "model")
    switched.save_pretrained(tmp_path / "model")
    settings = EvaluationSettings(str(tmp_path / "model"), str(data), str(tmp_path / "out"), max_new_tokens=4)
    with pytest.raises(UserError, match="no variable 'enable_thinkin'; its variables are: enable_thinking"):
        evaluate(dataclasses.replace(settings, chat_template_kwargs={"enable_thinkin": False}))
    assert evaluate(dataclasses.replace(settings, chat_template_kwargs={"enable_thinking": False})) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["settings"]["chat_template_kwargs"] == {"enable_thinking": False}


def test_evaluate_does_not_resume_with_other_weights(tmp_path, random_model_dir):
    """Replaced weights of the same size and modification time make the finished batches worthless."""
    data = write_records(tmp_path / "x.jsonl", make_records()[:8])
    shutil.copytree(random_model_dir, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    settings = EvaluationSettings(
        str(tmp_path / "model"), str(data), str(tmp_path / "out"), batch_size=4, max_new_tokens=4
    )

    assert evaluate(settings, StopAfterOneBatch()) == STOPPED_BY_SIGNAL
    times = weights.stat()
    tensors = load_file(weights)
    save_file({name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}, weights, {"format": "pt"})
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert weights.stat().st_size == times.st_size

    assert evaluate(settings) == 0
    assert evaluate(dataclasses.replace(settings, output=str(tmp_path / "fresh"))) == 0
    resumed, fresh = ((tmp_path / name / "generations.jsonl").read_bytes() for name in ("out", "fresh"))
    assert resumed == fresh


def test_evaluate_identifies_adapter_of_hub_by_commit(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit, repository = "a" * 40, tmp_path / "models--org--adapter"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit / "adapter_config.json").write_text("{}")
    assert _model_identity("org/adapter", make_model(tokenizer))["commit"] == commit


def test_command_missing_data_exits_with_status_2():
    command = [sys.executable, "-m", "pipeline.evaluation", "--local_rank=0", "--model", "none", "--data", "none.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: none.jsonl: no such file")
    assert done.stderr.count("\n") == 1


def test_evaluate_resumes_after_signal(tmp_path, random_model_dir, monkeypatch):
    data = write_records(tmp_path / "x.jsonl", make_records())
    settings = EvaluationSettings(
        str(random_model_dir), str(data), str(tmp_path / "whole"), batch_size=4, max_new_tokens=8
    )
    assert evaluate(settings) == 0

    calls = 0
    original = Qwen2ForCausalLM.generate

    def generate_and_count(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            signal.raise_signal(signal.SIGUSR1)
        return original(*args, **kwargs)

    monkeypatch.setattr(Qwen2ForCausalLM, "generate", generate_and_count)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    interrupted = dataclasses.replace(settings, output=str(tmp_path / "interrupted"))
    try:
        assert evaluate(interrupted, StopSignal()) == STOPPED_BY_SIGNAL
        assert calls == 2 and not (tmp_path / "interrupted" / "evaluation.json").exists()
        assert evaluate(interrupted, StopSignal()) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert calls == 5  # 18 examples in batches of 4: none was generated twice
    whole, resumed = ((tmp_path / name / "generations.jsonl").read_bytes() for name in ("whole", "interrupted"))
    assert whole == resumed
    assert not (tmp_path / "interrupted" / "generations.partial").exists()
