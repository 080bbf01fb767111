"""Load, pad and run tiny models."""

from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from data_prep.shards.format import PIVOT, TRANSLATION, PackedRow
from pipeline.common.errors import UserError
from pipeline.config.settings import ModelSettings
from pipeline.data.micro_batch import MicroBatch, collate
from pipeline.models.loading import load_model, load_model_config
from pipeline.models.packed_attention import resolve_attention
from pipeline.models.self_check import our_result
from pipeline.models.solar_model import decoder_hidden_states
from tests.runs import TINY

VOCAB = 61


def tiny(family: str, tied: bool = True, attention: str | None = None) -> PreTrainedModel:
    fields: dict[str, Any] = {**TINY, "vocab_size": VOCAB, "tie_word_embeddings": tied, "pad_token_id": 0}
    del fields["model_type"]
    if family == "gemma3_text":
        fields["sliding_window"] = 4
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation=resolve_attention(attention, config))


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


@pytest.mark.parametrize(
    ("family", "attention"), [("qwen2", "sdpa"), ("gemma3_text", "sdpa"), ("qwen2", None), ("gemma3_text", None)]
)
def test_decode_isolates_packed_sequences(family: str, attention: str | None) -> None:
    model, micro = tiny(family, attention=attention).eval(), batch()
    with torch.no_grad():
        packed = decoder_hidden_states(model, model.get_input_embeddings()(micro.input_ids), micro)
        model.set_attn_implementation("sdpa")
        for b, row in enumerate(rows()):
            start = 0
            for length in row.seq_lens.tolist():
                alone = model.get_decoder()(input_ids=micro.input_ids[b : b + 1, start : start + length])[0]
                torch.testing.assert_close(packed[b : b + 1, start : start + length], alone, rtol=1e-4, atol=2e-6)
                start += length


def test_load_model_with_activation_checkpointing(tmp_path: Any) -> None:
    tiny("qwen2").save_pretrained(tmp_path)
    results = []
    for checkpointing in (False, True):
        settings = ModelSettings(path=str(tmp_path), vocab_multiple=1, activation_checkpointing=checkpointing)
        model = load_model(settings, load_model_config(settings, VOCAB), torch.float32)
        assert model.is_gradient_checkpointing == checkpointing
        results.append(our_result(model, batch()))
    assert results[0].loss == results[1].loss
    torch.testing.assert_close(results[0].gradients, results[1].gradients)


def test_load_model_refuses_missing_weights(tmp_path: Any) -> None:
    """transformers would initialize them at random and only log it."""
    tiny("qwen2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = ModelSettings(path=str(tmp_path))
    with pytest.raises(UserError, match=r"lack 1 weights of the model.*first: model\.norm\.weight\)"):
        load_model(settings, load_model_config(settings, VOCAB), torch.float32)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("qwen2", {"hidden_act": "gelu"}, "Liger's MLP has the activation silu, not gelu"),
        ("cohere", {}, "no kernels for model_type 'cohere'"),
    ],
)
def test_load_model_refuses_liger_kernels(
    monkeypatch: pytest.MonkeyPatch, family: str, fields: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("pipeline.common.distributed.local_device", lambda: torch.device("cuda", 0))
    liger = ModuleType("liger")
    liger.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": None}  # type: ignore[attr-defined]
    monkeypatch.setattr("pipeline.models.loading.import_optional", lambda name: liger)
    config = {key: value for key, value in TINY.items() if key != "model_type"} | fields
    settings = ModelSettings(config={"model_type": family, **config}, use_liger_kernel=True)
    with pytest.raises(UserError, match=message):
        load_model(settings, load_model_config(settings, VOCAB), torch.float32)


def test_load_model_pads_vocabulary(tmp_path: Any) -> None:
    original = tiny("qwen2", tied=False)
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
        (
            ModelSettings(config={"model_type": "qwen2_5_omni"}),
            "'qwen2_5_omni' is not supported: it has no text decoder",
        ),
        (ModelSettings(config={"model_type": "t5"}), "'t5' is not supported: it has no text decoder"),
        (ModelSettings(config={"model_type": "no_such"}), "cannot load the model configuration"),
        (ModelSettings(config={}), "cannot load the model configuration"),
        (ModelSettings(config={**TINY, "num_hidden_layers": "auto"}), "'num_hidden_layers': .* expected int, got str"),
        (ModelSettings(path="/no/such/directory"), "/no/such/directory: cannot load the model configuration"),
        (ModelSettings(config={**TINY, "vocab_size": 50}), "vocab_size 50 is smaller than the tokenizer's 61"),
    ],
    ids=lambda value: "",
)
def test_load_model_config_refuses(settings: ModelSettings, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_model_config(settings, VOCAB)
    assert "\n" not in str(caught.value)
