"""The examples train with other frameworks, and their losses equal those of pipeline/train.py."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.tokenization.tokenizer import load_tokenizer
from tests.conftest import Prepared
from tests.runs import TINY, losses, start_ranks, train, write_recipe

STEPS, RATE, SEED, RANKS = 10, 3e-3, 5, 2
SOFTCAP = {"final_logit_softcapping": 1.0, "query_pre_attn_scalar": 8}


def run_example(name: str, *arguments: object) -> str:
    """Run an example on two ranks and return what rank 0 printed."""
    processes = start_ranks(RANKS, *arguments, script=f"examples/{name}.py")
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * RANKS, "\n".join(outputs)[-6000:]
    return outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_examples_give_losses_of_trainer(prepared: Prepared, tmp_path: Path, tied: bool) -> None:
    tokenizer = load_tokenizer(prepared.tokenizer)
    torch.manual_seed(0)
    scaled = {"model_type": "granite", "logits_scaling": 8.0} if tied else {"model_type": "gemma2", **SOFTCAP}
    fields = {**TINY, "vocab_size": len(tokenizer), "tie_word_embeddings": tied, **scaled}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = write_recipe(
        tmp_path / "run.yaml",
        prepared.shards,
        None,
        seed=SEED,
        model={"path": str(tmp_path / "model"), "vocab_multiple": 24},
        training__train_batch_size=RANKS,
        training__max_steps=STEPS,
        training__learning_rate=RATE,
        training__lr_scheduler_type="constant",
        training__warmup_ratio=0.0,
        training__weight_decay=0.0,
        training__adam_beta2=0.999,
    )
    train(RANKS, "--config", recipe)
    expected = losses(tmp_path / "run")
    common = ["--model", tmp_path / "model", "--shards", prepared.shards, "--learning_rate", RATE, "--seed", SEED]

    output = run_example("fsdp2", *common, "--steps", STEPS)
    assert [float(loss) for loss in re.findall(r"loss ([\d.]+)", output)] == pytest.approx(expected, abs=1e-5)
    if tied:
        trl = ["--output_dir", tmp_path / "trl", "--max_steps", STEPS, "--per_device_train_batch_size", 1]
        trl += ["--lr_scheduler_type", "constant", "--logging_steps", 1, "--use_cpu", "true", "--bf16", "false"]
        trl += ["--report_to", "none", "--gradient_checkpointing", "false"]
        run_example("trl_sft", *common, *trl)
        (state,) = (tmp_path / "trl").glob("checkpoint-*/trainer_state.json")
        log = json.loads(state.read_text())["log_history"]
        assert [entry["loss"] for entry in log if "loss" in entry] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("example", ["fsdp2", "trl_sft"])
def test_examples_refuse_head_with_bias(prepared: Prepared, tmp_path: Path, example: str) -> None:
    tokenizer = load_tokenizer(prepared.tokenizer)
    fields = {**TINY, "model_type": "phi", "vocab_size": len(tokenizer), "tie_word_embeddings": False}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments: list[object] = ["--model", tmp_path / "model", "--shards", prepared.shards]
    if example == "trl_sft":
        arguments += ["--output_dir", tmp_path / "trl", "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    (process,) = start_ranks(1, *arguments, script=f"examples/{example}.py")
    output = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "an LM head with a bias, which the loss does not support" in output, output[-3000:]
