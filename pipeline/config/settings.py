"""All settings of a run. `python pipeline/train.py --help` prints them with their defaults and explanations."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.loss.settings import LossSettings


@dataclass(frozen=True)
class ModelSettings:
    """The model to train.

    Attributes:
        path: directory or Hub model ID of a Hugging Face causal language model; null: build one from `model.config`.
        config: configuration of a model to build with random weights: `model_type` and its fields. `vocab_size`
            defaults to the tokenizer's.
        attn_implementation: attention implementation of transformers.
        vocab_multiple: pad the vocabulary to a multiple of this. The result must be divisible by the number of ranks.
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
        tokenizer: tokenizer that the shards were packed with; null: the one in `model.path`.
        language_weights: sampling weights, as {language: weight}. The weight of a row is the mean language weight over
            its tokens. A language that is not listed has weight 1.
    """

    shards: str = "runs/demo/shards"
    tokenizer: str | None = None
    language_weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingSettings:
    """Optimization and checkpoints. The names are those of Hugging Face and DeepSpeed.

    Attributes:
        train_batch_size: packed rows per optimizer step, over all ranks and gradient accumulation steps.
        train_micro_batch_size_per_gpu: packed rows per rank and forward pass. The number of gradient accumulation
            steps is computed from both batch sizes and the number of ranks.
        num_train_epochs: number of passes over the data; ignored if `max_steps` is set.
        max_steps: number of optimizer steps; null: computed from `num_train_epochs`.
        learning_rate: peak learning rate of AdamW.
        embedding_learning_rate: peak learning rate of the input embedding, which follows the same schedule; null:
            `learning_rate`. A tied head is the same matrix. An untied head has `learning_rate`.
        lr_scheduler_type: decay of the learning rate to 0 after the warm-up; `constant`: no decay.
        warmup_ratio: fraction of the steps over which the learning rate rises linearly from 0.
        weight_decay: weight decay of matrices. Vectors (norms, biases) have none.
        adam_beta1: decay rate of AdamW's first moment.
        adam_beta2: decay rate of AdamW's second moment.
        adam_epsilon: epsilon of AdamW.
        max_grad_norm: clip the global gradient norm to this; 0: no clipping.
        precision: data type of the model's weights and activations.
        save_steps: number of steps between checkpoints. The last step is always saved.
        save_total_limit: keep this many checkpoints; the oldest are deleted.
        save_in_background: continue training while a checkpoint is written. This requires host memory for a copy of
            each rank's part: 12 bytes x parameters / ranks.
        copy_checkpoints_to: second directory to copy the checkpoints of this run to. Training resumes from it if
            `output_dir` has none.
        hang_timeout_s: terminate the run after this many seconds without progress (a step, a save, loading).
        log_gradients_steps: number of steps between measurements of the gradient norms of the cross entropy and of the
            alignment term; null: never. A measured step runs forward and backward three times.
        max_loss_jump: terminate the run if the cross entropy exceeds the median of the last 50 steps by more than this
            (nats per token); null: never.
    """

    train_batch_size: int = 8
    train_micro_batch_size_per_gpu: int = 1
    num_train_epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float = 1e-5
    embedding_learning_rate: float | None = None
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
    log_gradients_steps: int | None = None
    max_loss_jump: float | None = 3.0


@dataclass(frozen=True)
class Config:
    """Settings of a run.

    Attributes:
        output_dir: directory for metrics and checkpoints. A run resumes from its newest complete checkpoint.
        seed: random seed of the data order and the initial weights.
        deepspeed: DeepSpeed JSON file. Batch sizes, precision and gradient clipping must be set in the recipe instead.
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
