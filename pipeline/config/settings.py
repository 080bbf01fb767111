"""The recipe: frozen dataclasses, read strictly from YAML and the command line; a mistake is one clear line."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.loss.settings import LossSettings


@dataclass(frozen=True)
class ModelSettings:
    """Which model to train.

    Attributes:
        path: directory or hub id of a Hugging Face causal language model; null builds one from `config`.
        config: configuration of a model to build from random weights (`model_type` and its fields); the
            vocabulary size is the tokenizer's.
        attn_implementation: sdpa, flash_attention_2 or eager.
        vocab_multiple: the vocabulary is padded to a multiple of this; every world size used must divide it.
        activation_checkpointing: recompute each layer in backward.
        trust_remote_code: run code from the model's repository.
    """

    path: str | None = None
    config: dict[str, Any] | None = None
    attn_implementation: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    vocab_multiple: int = 128
    activation_checkpointing: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DataSettings:
    """What to train on.

    Attributes:
        shards: directory made by `python -m data_prep pack`.
        tokenizer: the one that made them; null: the one in `model.path`.
        language_weights: how often a row comes in an epoch, relative to others, as the mean over its tokens of
            their language's weight; languages not named have 1.
    """

    shards: str = "runs/demo/shards"
    tokenizer: str | None = None
    language_weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingSettings:
    """The optimization, in the terms of Hugging Face and DeepSpeed.

    Attributes:
        train_batch_size: packed rows per optimizer step, over all ranks and accumulation steps.
        train_micro_batch_size_per_gpu: packed rows per rank and forward pass; accumulation follows from both.
        max_steps: optimizer steps; null: as many as num_train_epochs make.
        warmup_ratio: share of the steps over which the learning rate rises linearly from 0.
        weight_decay: on matrices; none on vectors (norms, biases).
        save_in_background: training goes on while a checkpoint is written; takes memory of the host for one copy of
            each rank's part, 12 bytes x parameters / ranks.
        copy_checkpoints_to: a second directory for checkpoints, of this run alone; resumed from where output_dir
            has none.
        hang_timeout_s: seconds without progress (a step, a save, loading) after which a run is ended.
        max_loss_jump: a cross entropy so far above the median of the last 50 steps (nats per token) ends the run;
            null: never.
    """

    train_batch_size: int = 8
    train_micro_batch_size_per_gpu: int = 1
    num_train_epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float = 1e-5
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    save_steps: int = 500
    save_total_limit: int = 2
    save_in_background: bool = True
    copy_checkpoints_to: str | None = None
    hang_timeout_s: float = 1800.0
    max_loss_jump: float | None = 3.0


@dataclass(frozen=True)
class Config:
    """One training run. `deepspeed` names a DeepSpeed JSON; batch sizes, precision and clipping are not set there."""

    output_dir: str = "runs/demo"
    seed: int = 42
    deepspeed: str = "ds_configs/zero3.json"
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
