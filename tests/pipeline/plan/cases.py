"""Models and runs that the tests of the planner share."""

from typing import Any

from transformers import AutoConfig

from pipeline.common.hardware import load_device
from pipeline.config.settings import Config, LossSettings, ModelSettings, TrainingSettings
from pipeline.models.loading import padded_vocab_size
from pipeline.plan.gathers import ZeroSettings
from pipeline.plan.model_facts import ModelStats, model_stats
from pipeline.plan.prediction import Cluster, Prediction
from pipeline.plan.workload import PlannedRun, Workload

ZERO = ZeroSettings.from_config(
    {
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 200_000_000,
            "stage3_max_live_parameters": 2_000_000_000,
            "stage3_max_reuse_distance": 2_000_000_000,
            "stage3_param_persistence_threshold": 1_000_000,
        }
    }
)
WORKLOAD = Workload(padded_tokens=4096, tokens=4096, target_tokens=2048, sequences=16, pairs=14, dataset_rows=1000)


def _fields(
    model_type: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": _fields("qwen2", 151936, 896, 4864, 24, 14, True) | {"num_key_value_heads": 2},
    "Qwen2.5-7B": _fields("qwen2", 152064, 3584, 18944, 28, 28, False) | {"num_key_value_heads": 4},
    "Qwen2.5-32B": _fields("qwen2", 152064, 5120, 27648, 64, 40, False) | {"num_key_value_heads": 8},
    "Llama-3.1-70B": _fields("llama", 128256, 8192, 28672, 80, 64, False) | {"num_key_value_heads": 8},
}


def stats_of(name: str, vocab_multiple: int = 1) -> ModelStats:
    config = AutoConfig.for_model(**MODELS[name])
    config.vocab_size = padded_vocab_size(config.vocab_size, vocab_multiple)
    return model_stats(config)


def prediction_of(
    name: str, nodes: int = 1, gpu: str = "h100", checkpointing: bool = False, **loss: object
) -> Prediction:
    """Predict two micro-steps of one row per GPU on nodes of eight GPUs. `loss`: loss settings."""
    config = Config(
        model=ModelSettings(activation_checkpointing=checkpointing),
        loss=LossSettings(**loss),  # type: ignore[arg-type]
        training=TrainingSettings(train_batch_size=16 * nodes),
    )
    cluster = Cluster(nodes, 8, load_device(gpu))
    run = PlannedRun(config, stats_of(name, 128), ZERO, WORKLOAD, 8 * nodes, speeds=cluster.speeds("bf16"))
    return Prediction(run, cluster)
