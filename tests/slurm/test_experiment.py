"""The whole of slurm/experiment.sh with a tiny model: variants are tuned, trained, evaluated and compared."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.tokenization.tokenizer import load_tokenizer
from tests.conftest import Prepared
from tests.runs import TINY, metrics
from tests.slurm.conftest import Cluster, log_of

pytestmark = pytest.mark.slow

ARGS = (
    "--training.max_steps 4 --training.precision fp32 --training.train_batch_size 8 --model.vocab_multiple 8 "
    "--training.train_micro_batch_size_per_gpu 2 --training.learning_rate 1e-3 --deepspeed ds_configs/zero3.json"
)


@pytest.mark.cluster_long
def test_experiment_trains_evaluates_and_compares(cluster: Cluster, checkout: Path, prepared: Prepared) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=600))
    model.save_pretrained(checkout / "model")
    load_tokenizer(prepared.tokenizer).save_pretrained(checkout / "model")
    dev = [json.loads(line) for line in (checkout / "train.jsonl").read_text().splitlines()[:4]]
    (checkout / "dev.jsonl").write_text("".join(json.dumps(record) + "\n" for record in dev))
    variables = {
        "MODEL": "model", "RECIPE": "pipeline/recipes/qwen2.5-0.5b.yaml", "INPUT": "train.jsonl", "DATA": "test.jsonl",
        "ANSWERS": "train.jsonl", "OUTPUT": "experiment", "ARMS": "sft words", "SEEDS": "1 2", "DEV": "dev.jsonl",
        "PREPARE_ARGS": "--max_seq_length 512", "TRAIN_ARGS": ARGS, "EVALUATE_ARGS": "--max_new_tokens 8",
    }  # fmt: skip
    lines = [line.split() for line in cluster.run("slurm/experiment.sh", cwd=checkout, **variables).splitlines()]
    names = [name for name, _ in lines]
    assert names[:2] == ["prepare", "evaluate"] and names[-1] == "compare" and names.count("choose") == 1
    assert (names.count("train"), names.count("evaluate")) == (2 * 3 + 2 * 2, 2 * 3 + 2 * 2 + 1)
    for _, job in lines:
        cluster.end(job)
    assert [cluster.state(job) for _, job in lines] == ["COMPLETED"] * len(lines), log_of(checkout)

    output = checkout / "experiment"
    sft, words = metrics(output / "sft-seed1"), metrics(output / "words-seed1")
    assert sft[0]["ce_loss"] == pytest.approx(words[0]["ce_loss"], rel=1e-6)  # the same model and data
    assert [m["num_tokens"] for m in sft] == [m["num_tokens"] for m in words]
    key, weight = json.loads((output / "choices" / "choices.json").read_text())["words"]["arguments"]
    assert key == "--loss.alignment_weight" and words[-1]["align_weight"] == float(weight)
    assert sft[-1]["align_weight"] == 0
    for run in ("base", "sft-seed1", "words-seed2"):
        assert json.loads((output / run / "evaluation.json").read_text())["languages"]
        assert json.loads((output / run / "representations.json").read_text())["representations"]
    assert json.loads((output / "words" / "comparison.json").read_text())["seeds"] == [1, 2]
    assert (output / "results.md").is_file() and (output / "report" / "report.html").is_file()
    assert cluster.run("slurm/experiment.sh", cwd=checkout, **variables) == ""  # everything is done


def test_experiment_checks_variables_before_submitting(cluster: Cluster, checkout: Path) -> None:
    for variables, message in (
        ({"MODEL": "model"}, "RECIPE is not set"),
        ({"MODEL": "no", "RECIPE": "r", "INPUT": "i", "DATA": "d", "OUTPUT": "o"}, "no: no model there"),
    ):
        with pytest.raises(AssertionError, match=message):
            cluster.run("slurm/experiment.sh", cwd=checkout, **variables)
