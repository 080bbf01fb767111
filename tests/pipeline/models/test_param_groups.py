"""Parameter groups of AdamW and their learning rates."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.settings import TrainingSettings
from pipeline.models.families import vocabulary_parameter
from pipeline.models.param_groups import adamw_arguments, set_learning_rates
from pipeline.training.schedules import embedding_learning_rate, learning_rate
from tests.runs import TINY


@pytest.mark.parametrize("rate", [None, 1e-4])
@pytest.mark.parametrize("tied", [True, False])
def test_adamw_arguments_embedding_group(tied: bool, rate: float | None) -> None:
    """An untied head has the learning rate of the other matrices."""
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{**TINY, "vocab_size": 40, "tie_word_embeddings": tied})
    )
    training = TrainingSettings(learning_rate=1e-3, embedding_learning_rate=rate, warmup_ratio=0.2, weight_decay=0.1)
    embedding = vocabulary_parameter(model.get_input_embeddings())
    groups, options = adamw_arguments(model, embedding, training)
    optimizer = torch.optim.AdamW(groups, **options)
    for step in (0, 5, 9):
        rates = learning_rate(training, step, 10), embedding_learning_rate(training, step, 10)
        assert rates[1] == (None if rate is None else pytest.approx(rates[0] / 10))
        set_learning_rates(optimizer.param_groups, *rates)
        found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        assert len(found) == len(list(model.parameters()))
        for parameter in model.parameters():
            group = found[id(parameter)]
            assert group["lr"] == (rates[1] if parameter is embedding and rate else rates[0])
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
