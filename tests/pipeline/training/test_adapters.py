"""LoRA and DoRA with ZeRO-3 on gloo ranks, against `peft` in one dense process."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.shards.format import ShardSet
from pipeline.config.recipe import load_config
from pipeline.data.loader import BatchSplit, Loader
from pipeline.data.micro_batch import local_normalizers
from pipeline.export import export
from pipeline.loss import solar_loss_reference
from pipeline.models.solar_model import decoder_hidden_states
from pipeline.training.schedules import alignment_weight, learning_rate
from tests.conftest import Prepared
from tests.pipeline.training.dense_validation import assert_matches_dense, dense_validation
from tests.runs import (
    TINY,
    losses,
    metrics,
    python,
    refuses,
    run_forked_ranks,
    select_rows,
    train,
    validations,
    write_recipe,
)

pytestmark = pytest.mark.slow

# tied, train_embeddings, and other settings
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "lora, tied, frozen": (True, {"r": 4, "lora_alpha": 6}),
    "dora, untied, frozen": (False, {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "dora, tied, trained": (True, {"r": 2, "use_dora": True, "train_embeddings": True}),
    "lora, untied, trained": (False, {"r": 2, "lora_alpha": 4, "train_embeddings": True}),
}

# Rank 4 on all linear layers of two layers, by `tied`; DoRA has the norm of each row as well.
_SIDES = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]  # inputs and outputs
ADAPTER_PARAMETERS = {tied: 2 * sum(4 * (i + o) + (0 if tied else o) for i, o in _SIDES) for tied in (True, False)}


def save_model(path: Path, tied: bool) -> Path:
    torch.manual_seed(0)
    fields = {**TINY, "vocab_size": 601, "tie_word_embeddings": tied}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)).save_pretrained(path)
    return path


def dense_records(recipe: Path) -> list[list[float]]:
    """Train in one process with `peft`, the dense loss, autograd, and torch's AdamW and clipping.

    Returns:
        Loss and gradient norm of each step.
    """
    config = load_config(recipe, [])
    t, adapter = config.training, config.model.adapter
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    targets = adapter.target_modules
    torch.manual_seed(config.seed)
    lora = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_dora=adapter.use_dora,
    )
    model = get_peft_model(base, lora)
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        module.weight.requires_grad_(adapter.train_embeddings)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": t.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(t.adam_beta1, t.adam_beta2), eps=t.adam_epsilon)
    loader = Loader(ShardSet.open(config.data.shards), BatchSplit(t.train_batch_size, 1, 0, 1), config.seed, 0, None)
    records: list[list[float]] = []
    assert t.max_steps is not None
    for step in range(t.max_steps):
        micro_batches = loader.next()
        normalizers, total = local_normalizers(micro_batches), torch.zeros(())
        for batch in micro_batches:
            embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
            hidden = decoder_hidden_states(base, torch.nn.functional.embedding(batch.input_ids, embedding), batch)
            hidden = hidden.flatten(0, 1)[batch.positions]
            weight = alignment_weight(config.loss, step, t.max_steps)
            terms = solar_loss_reference(hidden, head, embedding, batch.loss_batch, config.loss, weight, normalizers)
            total = total + terms[0]
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, t.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(t, step, t.max_steps)
        optimizer.step()
        records.append([float(total.detach()), float(norm)])
    return records


def test_adapters_match_dense_peft(prepared: Prepared, tmp_path: Path) -> None:
    """Of the two cases that share rows between ranks, the one on four ranks is trained on two nodes of hpZ."""
    (tmp_path / "hpz.json").write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}))
    recipes = []
    for number, (tied, adapter) in enumerate(CASES.values()):
        base = save_model(tmp_path / f"model-{tied}", tied)
        recipe = write_recipe(
            tmp_path / f"{number}.yaml",
            prepared.shards,
            prepared.tokenizer,
            model={
                "path": str(base), "vocab_multiple": 24, "adapter": adapter, "activation_checkpointing": number % 2 == 1
            },
            deepspeed=str(tmp_path / "hpz.json") if number == 2 else "ds_configs/zero3.json",
            training__train_batch_size=12,
            training__max_steps=2,
            training__max_grad_norm=0.5,
            training__sequence_parallel_size=1 + (number in (0, 2)),
        )  # fmt: skip
        recipes.append(recipe)
    expected = [dense_records(recipe) for recipe in recipes]
    assert any(norm > 0.5 for records in expected for _, norm in records)
    script = "tests/pipeline/training/adapter_ranks.py"
    for ranks, cases in ((1, [1]), (2, [0, 3]), (4, [2])):
        results = run_forked_ranks(ranks, [script, *(str(recipes[number]) for number in cases)])
        assert len(results) == len(cases)
        for number, result in zip(cases, results, strict=True):
            for (loss, norm), (dense_loss, dense_norm) in zip(result["records"], expected[number], strict=True):
                assert loss == pytest.approx(dense_loss, rel=1e-6), (number, ranks, result)
                assert norm == pytest.approx(dense_norm, rel=1e-5), (number, ranks, result)


def keep_up_to(directory: Path, step: int) -> None:
    """Delete later checkpoints, as if the run had been killed after saving checkpoint-`step`."""
    for path in directory.glob("checkpoint-*"):
        if int(path.name[11:]) > step:
            shutil.rmtree(path)


@torch.no_grad()
def assert_exports_match(run: Path, recipe: Path, base: Path, adapter: Path, merged: Path) -> None:
    """Compare both exports with the last validation of the run, and with each other as PEFT loads them."""
    (*_, validation) = validations(run)
    checkpoint = run / f"checkpoint-{validation['step']}"
    for directory in (adapter, merged):
        assert_matches_dense(validation, dense_validation(directory, recipe, checkpoint))
    ids = torch.arange(1, 40)[None]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    expected = model(ids).logits
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(merged)(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert (AutoModelForCausalLM.from_pretrained(base)(ids).logits - expected).abs().max() > 1e-2
    assert not [key for key in load_file(merged / "model.safetensors") if "lora" in key or "base_layer" in key]


@pytest.mark.parametrize("tied", [True, False], ids=["tied and trained", "untied and frozen"])
def test_adapter_run_resumes_and_exports(prepared: Prepared, tmp_path: Path, tied: bool) -> None:
    """The tied run has dropout, and resumes on the same number of ranks; the untied one on another number."""
    base = save_model(tmp_path / "model", tied)
    adapter = {"r": 4, "lora_dropout": 0.1, "train_embeddings": True} if tied else {"r": 4, "use_dora": True}
    recipe = write_recipe(
        tmp_path / "run.yaml",
        prepared.shards,
        prepared.tokenizer,
        model={"path": str(base), "vocab_multiple": 24, "adapter": adapter},
        data__eval_shards=str(select_rows(prepared.shards, tmp_path / "eval", slice(3))),
        training__max_steps=4,
        training__save_steps=2,
        training__learning_rate=0.01,
        training__export_at_end=tied,
        training__log_gradients_steps=4,
    )
    run = tmp_path / "run"
    train(2, "--config", recipe)
    expected = losses(run)
    keep_up_to(run, 2)
    weights = torch.load(next(run.glob("checkpoint-2/zero/*optim*")), weights_only=False)["optimizer_state_dict"]
    trained = sum(group.numel() for group in weights["fp32_flat_groups"])
    assert trained == (601 // 24 + 1) * 24 * 32 // 2 * tied + ADAPTER_PARAMETERS[tied] // 2
    assert sum(file.stat().st_size for file in run.glob("checkpoint-2/zero/*")) < 2 * (12 * 2 * trained + 60_000)
    assert metrics(run)[3]["align_grad_norm"] > 0
    output = train(2 if tied else 1, "--config", recipe)
    assert f"resumed from {run}/checkpoint-2" in output
    if tied:
        assert losses(run)[2:] == expected[2:]
    else:
        assert losses(run)[2:] == pytest.approx(expected[2:], rel=1e-6)
    target = run / "hf" if tied else tmp_path / "adapter"
    if not tied:
        export(run, target)
    export(run, tmp_path / "merged", merge=True)
    assert_exports_match(run, recipe, base, target, tmp_path / "merged")
    card = ModelCard.load(target / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "peft" and f"A {'LoRA' if tied else 'DoRA'} adapter of a" in card.text
    if tied:
        return
    (base / "generation_config.json").write_text("{}")  # part of the fingerprint
    refuses(python("-m", "pipeline.export", "--checkpoint", run, "--output", tmp_path / "other", "--merge"), "restore")
    refuses(python("pipeline/train.py", "--config", recipe), "different content of model.path")
