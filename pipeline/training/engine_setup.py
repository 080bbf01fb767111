"""Build the ZeRO-3 engine of a run. Used by the trainer and the benchmarks."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from pipeline.config.settings import Config
from pipeline.models.adapters import add_adapter
from pipeline.models.loading import DTYPES, load_model
from pipeline.zero3.engine import ZeroEngine
from pipeline.zero3.initialize import build_partitioned


def build_engine(
    config: Config, ds: dict[str, Any], model_config: PreTrainedConfig, vocab_size: int, num_languages: int
) -> ZeroEngine:
    """Load pretrained or initialize random weights, and initialize DeepSpeed. Collective: all ranks must call it.

    Args:
        config: the recipe.
        ds: the complete DeepSpeed configuration, see `deepspeed_config`.
        model_config: the model's configuration.
        vocab_size: number of vocabulary entries, without padding.
        num_languages: number of languages in the data.
    """
    dtype = DTYPES[config.training.precision]

    def build() -> PreTrainedModel:
        return add_adapter(load_model(config.model, model_config, dtype), config.model.adapter, config.seed)

    model = build_partitioned(ds, build)
    return ZeroEngine(config, ds, model, vocab_size, num_languages)
