"""The layer whose hidden states are aligned, and what a run without it does not do."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.config.settings import AdapterSettings
from pipeline.loss import LossSettings
from pipeline.models.adapters import adapted_meta_model
from pipeline.models.middle_layer import aligned_layer, check_layer, check_trained_below, record_output
from pipeline.models.solar_model import decoder_hidden_states
from tests.pipeline.models.sharing_ranks import gradients
from tests.pipeline.models.test_models import batch, tiny
from tests.runs import TINY


def aligned(layer: int | None = None) -> LossSettings:
    return LossSettings(pooling_tokens="hidden_states", layer=layer)


def test_default_layer_is_the_middle_one() -> None:
    assert [aligned_layer(aligned(), n) for n in (32, 28, 3, 1)] == [16, 14, 1, 1]
    assert aligned_layer(aligned(7), 28) == 7 and aligned_layer(LossSettings(), 28) is None


@pytest.mark.parametrize(("layer", "layers"), [(None, 1), (2, 2), (5, 2)])
def test_check_layer_refuses_last_layer(layer: int | None, layers: int) -> None:
    config = AutoConfig.for_model(**{**TINY, "num_hidden_layers": layers})
    message = rf"loss.layer {layer or 1} is not a middle layer of the model, which has {layers} decoder layers"
    with pytest.raises(UserError, match=message):
        check_layer(aligned(layer), config)
    check_layer(LossSettings(), config)
    check_layer(aligned(), AutoConfig.for_model(**TINY))


def test_check_trained_below_refuses_an_adapter_of_the_layers_above() -> None:
    config = AutoConfig.for_model(**TINY, vocab_size=64)

    def adapted(layer: int, **fields: bool) -> PreTrainedModel:
        return adapted_meta_model(config, AdapterSettings(r=2, target_modules=f"model.layers.{layer}.*proj", **fields))

    with pytest.raises(UserError, match="no module in the first 1 decoder layers, whose hidden states are aligned"):
        check_trained_below(aligned(), adapted(1))
    for model in (adapted(0), adapted(1, train_embeddings=True)):
        check_trained_below(aligned(), model)
    for settings in (LossSettings(), replace(aligned(), alignment_weight=0.0)):
        check_trained_below(settings, adapted(1))


def test_recorded_output_is_the_hidden_states_of_transformers() -> None:
    model, micro_batch = tiny("qwen2", attention="sdpa"), batch()
    embeddings = model.get_input_embeddings()(micro_batch.input_ids)
    arguments = {"position_ids": micro_batch.position_ids, "use_cache": False}
    expected = model.get_decoder()(inputs_embeds=embeddings, output_hidden_states=True, **arguments).hidden_states
    with record_output(model.get_decoder().layers[0]) as outputs:
        decoder_hidden_states(model, embeddings, micro_batch)
    decoder_hidden_states(model, embeddings, micro_batch)
    assert len(outputs) == 1 and outputs[0].requires_grad
    torch.testing.assert_close(outputs[0], expected[1])


def test_other_losses_install_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a hook was installed")

    monkeypatch.setattr(nn.Module, "register_forward_hook", refuse)
    gradients(None, "qwen2", 1, 1, LossSettings(), False)
    with pytest.raises(AssertionError, match="a hook was installed"):
        gradients(None, "qwen2", 1, 1, aligned(), False)
