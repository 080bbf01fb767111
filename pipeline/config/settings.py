"""All settings of a run. `python pipeline/train.py --help` prints them with their defaults and explanations."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.loss.settings import LossSettings


@dataclass(frozen=True)
class ModelSettings:
    """The model to train.

    Attributes:
        path: directory or hub id of a Hugging Face causal language model; null: build one from `model.config`.
        config: configuration of a model to build from random weights: `model_type` and its fields. The vocabulary
            size defaults to the tokenizer's.
        attn_implementation: attention implementation of transformers.
        vocab_multiple: pad the vocabulary to a multiple of this. Every number of ranks in use must divide the result.
        activation_checkpointing: recompute each decoder layer in backward instead of storing its activations.
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
    """The data to train on.

    Attributes:
        shards: directory of packed shards, written by `python -m data_prep pack`.
        tokenizer: the tokenizer that packed the shards; null: the one in `model.path`.
        language_weights: sampling weight of each language, as {language: weight}. A row's weight is the mean over its
            tokens of their language's weight. A language that is not listed has weight 1.
    """

    shards: str = "runs/demo/shards"
    tokenizer: str | None = None
    language_weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingSettings:
    """Optimization and checkpoints, in the terms of Hugging Face and DeepSpeed.

    Attributes:
        train_batch_size: packed rows per optimizer step, over all ranks and gradient accumulation steps.
        train_micro_batch_size_per_gpu: packed rows per rank and forward pass. The number of gradient accumulation
            steps follows from both batch sizes and the number of ranks.
        num_train_epochs: passes over the data, if `max_steps` is null.
        max_steps: number of optimizer steps; null: as many as `num_train_epochs` takes.
        learning_rate: peak learning rate of AdamW.
        lr_scheduler_type: decay of the learning rate to 0 after the warm-up; `constant`: no decay.
        warmup_ratio: fraction of the steps over which the learning rate rises linearly from 0.
        weight_decay: weight decay of matrices. Vectors (norms, biases) have none.
        adam_beta1: decay rate of AdamW's first moment.
        adam_beta2: decay rate of AdamW's second moment.
        adam_epsilon: epsilon of AdamW.
        max_grad_norm: clip the global gradient norm to this; 0: no clipping.
        precision: data type of the model's weights and activations.
        save_steps: save a checkpoint every so many steps, and at the end.
        save_total_limit: keep this many checkpoints; the oldest are deleted.
        save_in_background: continue to train while a checkpoint is written. This keeps one copy of each rank's part in
            host memory: 12 bytes x parameters / ranks.
        copy_checkpoints_to: second directory for the checkpoints of this run. Training resumes from it if
            `output_dir` has none.
        hang_timeout_s: end the run after so many seconds without progress (a step, a save, loading).
        max_loss_jump: end the run if the cross entropy exceeds the median of the last 50 steps by this (nats per
            token); null: never.
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
    """The run.

    Attributes:
        output_dir: directory of metrics and checkpoints. A run resumes from its newest complete checkpoint.
        seed: seed of the data order and of random weights.
        deepspeed: DeepSpeed JSON file. Batch sizes, precision and gradient clipping are set in the recipe, not there.
        model: the model to train.
        data: the data to train on.
        loss: the SOLAR loss.
        training: optimization and checkpoints.
    """

    output_dir: str = "runs/demo"
    seed: int = 42
    deepspeed: str = "ds_configs/zero3.json"
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
