"""Compare each supported family with the model's own forward pass, on a tiny instance."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from data_prep.shards.format import PIVOT, TRANSLATION, PackedRow
from pipeline.common.errors import UserError
from pipeline.config.settings import ModelSettings
from pipeline.data.micro_batch import MicroBatch, collate
from pipeline.loss import LossNormalizers, LossSettings, Vocabulary, VocabularyShard
from pipeline.models.families import FAMILIES, head_config
from pipeline.models.loading import load_model, load_model_config
from pipeline.models.packed_attention import resolve_attention
from pipeline.models.solar_model import SolarModel, decode
from tests.runs import TINY

VOCAB = 61


def tiny(family: str, tied: bool = True, attention: str | None = None) -> PreTrainedModel:
    fields: dict[str, Any] = {**TINY, "vocab_size": VOCAB, "tie_word_embeddings": tied, "pad_token_id": 0}
    del fields["model_type"]
    if family == "phi":
        fields.pop("head_dim")
        fields["num_key_value_heads"] = 4
    if family.startswith("gemma"):
        fields |= {"query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0 if family == "gemma2" else None}
    if family == "mistral" or family.startswith("gemma"):
        fields["sliding_window"] = 4
    if family == "granite":
        fields |= {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=resolve_attention(attention, config))
    for name, parameter in model.named_parameters():
        if name.endswith("lm_head.bias"):
            torch.nn.init.normal_(parameter)
    return model.double()


def rows() -> list[PackedRow]:
    """Make two rows: pair groups of uneven length, and a single pivot."""
    import numpy as np

    generator = np.random.default_rng(0)
    made = []
    for lengths, roles in (((5, 7, 4), (PIVOT, TRANSLATION, TRANSLATION)), ((9, 1, 3), (PIVOT, PIVOT, TRANSLATION))):
        ids = generator.integers(1, VOCAB, sum(lengths)).astype(np.int32)
        labels = ids.copy()
        start = 0
        for length in lengths:
            labels[start : start + (length + 1) // 2] = -100
            start += length
        names = [f"p{i}" for i in np.cumsum([role == PIVOT for role in roles])]
        made.append(PackedRow(ids, labels, np.array(lengths, np.int32), names, ["en", "sw", "th"], list(roles)))
    return made


def batch() -> MicroBatch:
    return collate(rows(), ["en", "sw", "th"], pad_token_id=0)


def own_loss(model: PreTrainedModel) -> torch.Tensor:
    """Compute the model's own mean cross entropy over the target tokens, one unpacked sequence at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows():
        start = 0
        for length in row.seq_lens.tolist():
            ids = torch.from_numpy(row.input_ids[start : start + length]).long()[None]
            labels = torch.from_numpy(row.labels[start : start + length]).long()[None]
            targets = int((labels[:, 1:] != -100).sum())
            if targets:
                total = total + model(input_ids=ids, labels=labels).loss.double() * targets
                count += targets
            start += length
    return total / count


def our_loss(model: PreTrainedModel, micro: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Compute our loss without alignment, and every gradient, in one process whose shard is the whole vocabulary."""
    head, embedding, config = model.get_output_embeddings(), model.get_input_embeddings(), head_config(model)

    def shard(weight: torch.Tensor) -> VocabularyShard:
        return VocabularyShard(weight.detach(), 0, torch.zeros_like(weight))

    embedding_shard = shard(embedding.weight)
    vocabulary = Vocabulary(
        VOCAB,
        embedding_shard if config.tied else shard(head.weight),
        embedding_shard,
        bias=None if config.bias is None else config.bias.detach(),
        bias_grad=None if config.bias is None else torch.zeros_like(config.bias),
        logit_scale=config.logit_scale,
        softcap=config.softcap,
    )
    module = SolarModel(model, LossSettings(), VOCAB, 3)
    normalizers = micro.loss_batch.normalizers()
    loss, _ = module(micro, vocabulary, 0.0, LossNormalizers(normalizers.tokens, 0), None, None, 1.0)
    model.zero_grad()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    names = {id(p): name for name, p in model.named_parameters()}
    grads[names[id(embedding.weight)]] = embedding_shard.grad
    grads[names[id(head.weight)]] = vocabulary.head.grad
    if config.bias is not None:
        grads[names[id(config.bias)]] = vocabulary.bias_grad
    return loss.detach(), grads


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_solar_model_matches_own_forward(family: str, tied: bool) -> None:
    """Compare packed rows under our attention with single sequences under transformers' own.

    The untied models recompute their activations in backward.
    """
    model = tiny(family, tied)
    if not tied:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, grads = our_loss(model, batch())
    model.zero_grad()
    model.gradient_checkpointing_disable()
    model.set_attn_implementation("eager")
    expected = own_loss(model)
    expected.backward()
    # Families keep rotary embeddings and norms in fp32 inside a float64 model.
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert grads.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        error = (grads[name] - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-6)
        assert error < 1e-5, name


@pytest.mark.parametrize(
    ("family", "attention"), [("qwen2", "sdpa"), ("gemma3_text", "sdpa"), ("qwen2", None), ("gemma3_text", None)]
)
def test_decode_isolates_packed_sequences(family: str, attention: str | None) -> None:
    model, micro = tiny(family, attention=attention).float().eval(), batch()
    with torch.no_grad():
        packed = decode(model, model.get_input_embeddings()(micro.input_ids), micro)
        model.set_attn_implementation("sdpa")
        for b, row in enumerate(rows()):
            start = 0
            for length in row.seq_lens.tolist():
                alone = model.get_decoder()(input_ids=micro.input_ids[b : b + 1, start : start + length])[0]
                torch.testing.assert_close(packed[b : b + 1, start : start + length], alone, rtol=1e-4, atol=2e-6)
                start += length


def test_load_model_with_activation_checkpointing(tmp_path: Any) -> None:
    tiny("qwen2").float().save_pretrained(tmp_path)
    results = []
    for checkpointing in (False, True):
        settings = ModelSettings(path=str(tmp_path), vocab_multiple=1, activation_checkpointing=checkpointing)
        model = load_model(settings, load_model_config(settings, VOCAB), torch.float32)
        assert model.is_gradient_checkpointing == checkpointing
        results.append(our_loss(model, batch()))
    assert results[0][0] == results[1][0]
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad)


def test_load_model_pads_vocabulary(tmp_path: Any) -> None:
    original = tiny("qwen2", tied=False).float()
    original.save_pretrained(tmp_path)
    settings = ModelSettings(path=str(tmp_path), vocab_multiple=16)
    model = load_model(settings, load_model_config(settings, VOCAB), torch.float32)
    for mine, its in (
        (model.get_input_embeddings(), original.get_input_embeddings()),
        (model.get_output_embeddings(), original.get_output_embeddings()),
    ):
        assert mine.weight.shape[0] == 64
        assert torch.equal(mine.weight[:VOCAB], its.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ModelSettings(config={"model_type": "gpt2"}), "'gpt2' is not supported"),
        (ModelSettings(config={"model_type": "no_such"}), "cannot load the model configuration"),
        (ModelSettings(config={}), "cannot load the model configuration"),
        (ModelSettings(path="/no/such/directory"), "/no/such/directory: cannot load the model configuration"),
        (ModelSettings(config={**TINY, "vocab_size": 50}), "vocab_size 50 is smaller than the tokenizer's 61"),
    ],
    ids=lambda value: "",
)
def test_load_model_config_refuses(settings: ModelSettings, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_model_config(settings, VOCAB)
    assert "\n" not in str(caught.value)
