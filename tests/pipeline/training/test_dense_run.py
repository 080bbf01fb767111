"""ZeRO-3 runs of a tiny model on gloo ranks against one dense process."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.shards.format import ShardSet
from pipeline.config.recipe import load_config
from pipeline.data.loader import BatchSplit, Loader
from pipeline.data.micro_batch import local_normalizers
from pipeline.loss import LossNormalizers, solar_loss_reference
from pipeline.models.solar_model import decoder_hidden_states
from pipeline.training.schedules import alignment_weight, learning_rate
from tests.conftest import Prepared
from tests.runs import ROOT, TINY, metrics, train, write_recipe

pytestmark = pytest.mark.slow

# Settings that keep ZeRO-3 parameters gathered
RELEASED = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")


def dense_metrics(recipe: Path) -> list[dict[str, float]]:
    """Train in one process with the dense loss, autograd, and torch's AdamW and clipping.

    Returns:
        For each step, the loss and the gradient norms of the cross entropy and of the alignment term.
    """
    config = load_config(recipe, [])
    t = config.training
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    shards = ShardSet.open(config.data.shards)
    loader = Loader(shards, BatchSplit(t.train_batch_size, 1, 0, 1), config.seed, 0, None)
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not embedding]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": t.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
            {"params": [embedding], "weight_decay": t.weight_decay},
        ],
        betas=(t.adam_beta1, t.adam_beta2),
        eps=t.adam_epsilon,
    )
    assert t.max_steps is not None
    records = []
    for step in range(t.max_steps):
        micro_batches = loader.next()
        normalizers: LossNormalizers = local_normalizers(micro_batches)
        weight = alignment_weight(config.loss, step, t.max_steps)
        ce, alignment = torch.zeros(()), torch.zeros(())
        for batch in micro_batches:
            embeddings = model.get_input_embeddings()(batch.input_ids)
            hidden = decoder_hidden_states(model, embeddings, batch).flatten(0, 1)[batch.positions]
            head = model.get_output_embeddings().weight
            terms = solar_loss_reference(hidden, head, embedding, batch.loss_batch, config.loss, weight, normalizers)
            ce, alignment = ce + terms[1], alignment + terms[2]
        loss = ce + weight * alignment
        norms = [grad_norm(term, list(model.parameters())) for term in (ce, alignment)]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), t.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(t, step, t.max_steps)
        assert t.embedding_learning_rate is not None
        optimizer.param_groups[-1]["lr"] *= t.embedding_learning_rate / t.learning_rate
        optimizer.step()
        records.append({"loss": float(loss.detach()), "ce_grad_norm": norms[0], "align_grad_norm": norms[1]})
    return records


def grad_norm(term: torch.Tensor, parameters: list[torch.Tensor]) -> float:
    """Return the norm of the gradient of a scalar. The graph is kept."""
    gradients = torch.autograd.grad(term, parameters, retain_graph=True)
    return float(torch.cat([gradient.flatten() for gradient in gradients]).norm())


@pytest.mark.parametrize(("family", "tied"), [("qwen2", False), ("llama", False), ("gemma3_text", True)])
def test_train_matches_dense_single_process(prepared: Prepared, tmp_path: Path, family: str, tied: bool) -> None:
    """Use two ranks, two gradient accumulation steps, active clipping, a padded vocabulary and two learning rates.

    The Llama model is trained with hpZ, and with every parameter released after use, so that backward gathers the
    secondary partitions.
    """
    ds = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    if family == "llama":
        ds["zero_optimization"] |= dict.fromkeys(RELEASED, 0) | {"zero_hpz_partition_size": 2}
    (tmp_path / "ds.json").write_text(json.dumps(ds))
    fields = {**TINY, "model_type": family, "vocab_size": 601, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    model.save_pretrained(tmp_path / "model")
    recipe = write_recipe(
        tmp_path / "run.yaml",
        prepared.shards,
        prepared.tokenizer,
        deepspeed=str(tmp_path / "ds.json"),
        model={"path": str(tmp_path / "model"), "vocab_multiple": 8},
        training__max_steps=10,
        training__max_grad_norm=0.5,
        loss__soft_token_embeddings="output" if family == "qwen2" else "input",
        training__embedding_learning_rate=0.0005,
        training__log_gradients_steps=2,
    )
    output = train(2, "--config", recipe)
    assert output.count("soft_token_embeddings: makes no difference") == (tied and family == "qwen2")
    sharded, dense = metrics(tmp_path / "run"), dense_metrics(recipe)
    assert len(sharded) == 10 and sharded[-1]["loss"] < sharded[0]["loss"]
    assert any(record["grad_norm"] > 0.5 for record in sharded)
    assert [record["loss"] for record in sharded] == pytest.approx([record["loss"] for record in dense], rel=1e-5)
    assert sharded[4]["embedding_learning_rate"] == pytest.approx(sharded[4]["learning_rate"] / 6, rel=1e-12)
    assert all(record["gradient_norms_seconds"] > 0 for record in sharded[1::2])
    for name in ("ce_grad_norm", "align_grad_norm"):
        assert [record["step"] for record in sharded if name in record] == [2, 4, 6, 8, 10]
        measured, expected = ([record[name] for record in records[1::2]] for records in (sharded, dense))
        assert measured[0] == pytest.approx(expected[0], rel=1e-5)
        assert measured == pytest.approx(expected, rel=1e-4)  # rounding of the weights accumulates over the steps
