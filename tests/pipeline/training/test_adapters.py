"""LoRA and DoRA with ZeRO-3 on gloo ranks, against `peft` in one dense process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.shards.format import ShardSet
from pipeline.config.recipe import load_config
from pipeline.data.loader import BatchSplit, Loader
from pipeline.data.micro_batch import local_normalizers
from pipeline.loss import solar_loss_reference
from pipeline.models.solar_model import decode
from pipeline.training.schedules import alignment_weight, learning_rate
from tests.conftest import Prepared
from tests.runs import TINY, run_forked_ranks, write_recipe

pytestmark = pytest.mark.slow

# tied, train_embeddings, and other settings
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "lora, tied, frozen": (True, {"r": 4, "lora_alpha": 6}),
    "dora, untied, frozen": (False, {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "dora, tied, trained": (True, {"r": 2, "use_dora": True, "train_embeddings": True}),
    "lora, untied, trained": (False, {"r": 2, "lora_alpha": 4, "train_embeddings": True}),
}


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
            hidden = decode(base, torch.nn.functional.embedding(batch.input_ids, embedding), batch)
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
            training__train_batch_size=12,
            training__max_steps=4,
            training__max_grad_norm=0.5,
        )  # fmt: skip
        recipes.append(recipe)
    expected = [dense_records(recipe) for recipe in recipes]
    assert any(norm > 0.5 for records in expected for _, norm in records)
    for ranks in (1, 2, 3, 4):
        script = "tests/pipeline/training/adapter_ranks.py"
        results = run_forked_ranks(ranks, [script, *map(str, recipes)])
        assert len(results) == len(recipes)
        for name, result, dense in zip(CASES, results, expected, strict=True):
            for (loss, norm), (dense_loss, dense_norm) in zip(result["records"], dense, strict=True):
                assert loss == pytest.approx(dense_loss, rel=1e-6), (name, ranks, result, dense)
                assert norm == pytest.approx(dense_norm, rel=1e-5), (name, ranks, result, dense)
