"""All settings of a run. `python pipeline/train.py --help` prints them with their defaults and explanations.

The metadata of a field has two optional entries, which --help prints as well:

range: interval of the valid numbers, such as "(0, inf)" or "[0, 1]". Every number has one.
on_resume: "may change" if a resumed run may have another value, which is recorded; "same content" if the value may
    change but not the content that it names; if absent, another value is refused.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.loss.settings import LossSettings


@dataclass(frozen=True)
class AdapterSettings:
    """LoRA or DoRA adapter of the decoder, instead of full fine-tuning. The names are those of `peft.LoraConfig`.

    Attributes:
        r: rank of the adapter; null: no adapter, all weights are trained.
        lora_alpha: the product of the two low-rank matrices is multiplied by `lora_alpha` / `r`.
        lora_dropout: dropout probability of the adapter's input.
        target_modules: names of the linear layers of the decoder to adapt, or a regular expression of full names;
            all-linear: all of them.
        use_dora: train the norm of each weight's rows as well (DoRA).
        train_embeddings: train input embedding and LM head as a whole; otherwise they are frozen.
    """

    r: int | None = field(default=None, metadata={"range": "(0, inf)"})
    lora_alpha: int = field(default=8, metadata={"range": "(0, inf)"})
    lora_dropout: float = field(default=0.0, metadata={"range": "[0, 1)"})
    target_modules: tuple[str, ...] | str = "all-linear"
    use_dora: bool = False
    train_embeddings: bool = False

    @property
    def freezes_embeddings(self) -> bool:
        """Whether input embedding and LM head are frozen."""
        return self.r is not None and not self.train_embeddings


@dataclass(frozen=True)
class ModelSettings:
    """The model to train.

    Attributes:
        path: directory or Hub model ID of a Hugging Face causal language model; null: build one from `model.config`.
        config: configuration of a model to build with random weights: `model_type` and its fields. `vocab_size`
            defaults to the tokenizer's.
        attn_implementation: solar_packed, sdpa, eager, flash_attention_2, or a kernel from the Hub such as
            kernels-community/flash-attn2; null: solar_packed, or eager for models that cap their attention scores
            (Gemma 2), or sdpa for models with attention dropout.
        vocab_multiple: pad the vocabulary to a multiple of this. The result must be divisible by the number of ranks.
            On resume, the value may change if the result stays the same.
        activation_checkpointing: recompute each decoder layer in backward instead of storing its activations.
        use_liger_kernel: replace RMSNorm, MLP and rotary embedding by the kernels of the liger-kernel package (GPU).
        trust_remote_code: run code from the model's repository.
        adapter: LoRA or DoRA.
    """

    path: str | None = field(default=None, metadata={"on_resume": "same content"})
    config: dict[str, Any] | None = field(default=None, metadata={"on_resume": "same content"})
    attn_implementation: str | None = field(default=None, metadata={"on_resume": "may change"})
    vocab_multiple: int = field(default=128, metadata={"range": "(0, 1000000]", "on_resume": "may change"})
    activation_checkpointing: bool = field(default=False, metadata={"on_resume": "may change"})
    use_liger_kernel: bool = field(default=False, metadata={"on_resume": "may change"})
    trust_remote_code: bool = field(default=False, metadata={"on_resume": "may change"})
    adapter: AdapterSettings = field(default_factory=AdapterSettings)


@dataclass(frozen=True)
class DataSettings:
    """The data to train on.

    Attributes:
        shards: directory of packed shards, written by `python -m data_prep pack`, or a list of them. All must have
            been packed with the same tokenizer and chat template.
        source_weights: sampling weights of the directories in `shards`, in the same order: the fractions of the rows of
            an epoch after division by their sum; null: each row once per epoch.
        tokenizer: tokenizer that the shards were packed with; null: the one in `model.path`.
        language_weights: sampling weights, as {language: weight}. The weight of a row is the mean language weight over
            its tokens. A language that is not listed has weight 1.
        eval_shards: directory of packed shards for validation, packed with the same tokenizer and chat template; null:
            no validation.
    """

    shards: list[str] | str = field(default="runs/demo/shards-records", metadata={"on_resume": "same content"})
    source_weights: list[float] | None = field(default=None, metadata={"range": "(0, inf)"})
    tokenizer: str | None = field(default=None, metadata={"on_resume": "same content"})
    language_weights: dict[str, float] = field(default_factory=dict, metadata={"range": "(0, inf)"})
    eval_shards: str | None = field(default=None, metadata={"on_resume": "may change"})


@dataclass(frozen=True)
class TrainingSettings:
    """Optimization and checkpoints. The names are those of Hugging Face and DeepSpeed.

    Attributes:
        train_batch_size: packed rows per optimizer step, over all ranks and gradient accumulation steps.
        train_micro_batch_size_per_gpu: packed rows per rank and forward pass. The number of gradient accumulation
            steps is computed from both batch sizes and the number of ranks.
        sequence_parallel_size: number of consecutive ranks that share each packed row, so that each has the activations
            of only a part of it. The ranks that share rows count as one for `train_batch_size`.
        num_train_epochs: number of passes over the data; ignored if `max_steps` is set.
        max_steps: number of optimizer steps; null: computed from `num_train_epochs`.
        learning_rate: peak learning rate of AdamW.
        embedding_learning_rate: peak learning rate of the input embedding, which follows the same schedule; null:
            `learning_rate`. A tied head is the same matrix. An untied head has `learning_rate`. On resume,
            the value may change, but not between null and a number.
        lr_scheduler_type: decay of the learning rate to 0 after the warm-up; `constant`: no decay.
        warmup_ratio: fraction of the steps over which the learning rate rises linearly from 0.
        weight_decay: weight decay of matrices. Vectors (norms, biases) have none.
        adam_beta1: decay rate of AdamW's first moment.
        adam_beta2: decay rate of AdamW's second moment.
        adam_epsilon: epsilon of AdamW.
        max_grad_norm: clip the global gradient norm to this; 0: no clipping.
        precision: data type of the model's weights and activations.
        save_steps: number of steps between checkpoints. The last step is always saved.
        save_total_limit: keep this many checkpoints; the oldest are deleted. The best one by `metric_for_best_model`
            counts but is never deleted.
        save_in_background: continue training while a checkpoint is written. This requires host memory for a copy of
            each rank's part: 12 bytes x parameters / ranks.
        copy_checkpoints_to: second directory to copy the checkpoints of this run to. Training resumes from it if
            `output_dir` has none.
        hang_timeout_s: terminate the run after this many seconds without progress (a micro-step, a save, loading).
        log_gradients_steps: number of steps between measurements of the gradient norms of the cross entropy and of the
            alignment term; null: never. A measured step runs forward and backward three times.
        export_at_end: when the run is finished, write the model to `hf` in `output_dir`, as pipeline.export does.
        report_to: experiment trackers, one or a list: tensorboard, wandb, mlflow, trackio, comet_ml, aim, swanlab,
            clearml, dvclive; `all` that are installed; `none`.
        max_loss_jump: terminate the run if the cross entropy exceeds the median of the last 50 steps by more than this
            (nats per token); null: never.
        eval_steps: number of steps between validations on `data.eval_shards`. The last step is always validated. null:
            only the last step.
        metric_for_best_model: validation metric that selects the best checkpoint: eval_loss, eval_ce, eval_ce_LANG,
            eval_alignment or eval_align_cos. A checkpoint is saved whenever it improves. null: none.
        greater_is_better: whether a greater value of this metric is better; null: for eval_align_cos only.
        early_stopping_patience: end the run after this many validations in a row without improvement of
            `metric_for_best_model`; null: never.
    """

    train_batch_size: int = field(default=8, metadata={"range": "(0, inf)"})
    train_micro_batch_size_per_gpu: int = field(default=1, metadata={"range": "(0, inf)", "on_resume": "may change"})
    sequence_parallel_size: int = field(default=1, metadata={"range": "(0, inf)", "on_resume": "may change"})
    num_train_epochs: float = field(default=1.0, metadata={"range": "(0, 1000000]", "on_resume": "may change"})
    max_steps: int | None = field(default=None, metadata={"range": "(0, inf)", "on_resume": "may change"})
    learning_rate: float = field(default=1e-5, metadata={"range": "(0, inf)", "on_resume": "may change"})
    embedding_learning_rate: float | None = field(
        default=None, metadata={"range": "(0, inf)", "on_resume": "may change"}
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = field(
        default="cosine", metadata={"on_resume": "may change"}
    )
    warmup_ratio: float = field(default=0.03, metadata={"range": "[0, 1]", "on_resume": "may change"})
    weight_decay: float = field(default=0.0, metadata={"range": "[0, inf)", "on_resume": "may change"})
    adam_beta1: float = field(default=0.9, metadata={"range": "[0, 1)", "on_resume": "may change"})
    adam_beta2: float = field(default=0.999, metadata={"range": "[0, 1)", "on_resume": "may change"})
    adam_epsilon: float = field(default=1e-8, metadata={"range": "(0, inf)", "on_resume": "may change"})
    max_grad_norm: float = field(default=1.0, metadata={"range": "[0, inf)", "on_resume": "may change"})
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    save_steps: int = field(default=500, metadata={"range": "(0, inf)", "on_resume": "may change"})
    save_total_limit: int = field(default=2, metadata={"range": "(0, inf)", "on_resume": "may change"})
    save_in_background: bool = field(default=True, metadata={"on_resume": "may change"})
    copy_checkpoints_to: str | None = field(default=None, metadata={"on_resume": "may change"})
    hang_timeout_s: float = field(default=1800.0, metadata={"range": "(0, 1000000]", "on_resume": "may change"})
    log_gradients_steps: int | None = field(default=None, metadata={"range": "(0, inf)", "on_resume": "may change"})
    export_at_end: bool = field(default=True, metadata={"on_resume": "may change"})
    report_to: tuple[str, ...] | str = field(default="tensorboard", metadata={"on_resume": "may change"})
    max_loss_jump: float | None = field(default=3.0, metadata={"range": "(0, inf)", "on_resume": "may change"})
    eval_steps: int | None = field(default=None, metadata={"range": "(0, inf)", "on_resume": "may change"})
    metric_for_best_model: str | None = field(default=None, metadata={"on_resume": "may change"})
    greater_is_better: bool | None = field(default=None, metadata={"on_resume": "may change"})
    early_stopping_patience: int | None = field(default=None, metadata={"range": "(0, inf)", "on_resume": "may change"})


@dataclass(frozen=True)
class Config:
    """Settings of a run.

    Attributes:
        output_dir: directory for metrics and checkpoints. A run resumes from its newest complete checkpoint.
        seed: random seed of the data order and the initial weights.
        deepspeed: DeepSpeed JSON file. A relative path that does not exist is looked up in the repository. "auto" is
            filled from the recipe as in Hugging Face's Trainer. A value that contradicts the recipe is refused.
        model: the model to train.
        data: the data to train on.
        loss: the SOLAR loss.
        training: optimization and checkpoints.
    """

    output_dir: str = field(default="runs/demo/solar-seed42", metadata={"on_resume": "may change"})
    seed: int = field(default=42, metadata={"range": "[0, 4294967295]"})
    deepspeed: str = field(default="ds_configs/zero3.json", metadata={"on_resume": "may change"})
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def vocabulary_ranks(self, ranks: int, hpz: int) -> int:
        """Return the number of consecutive ranks between which head and input embedding are divided.

        Without hpZ, these are all ranks. With hpZ, they are the ranks of a secondary partition, usually a node; but all
        ranks if the loss compares sequences of different ranks (InfoNCE, centring), or if the ranks that share a packed
        row are not all in one secondary partition.

        Args:
            ranks: the world size.
            hpz: `zero_hpz_partition_size` of the DeepSpeed file, 1 without hpZ.
        """
        compared = self.loss.compares_micro_step
        return ranks if hpz == 1 or compared or hpz % self.training.sequence_parallel_size else hpz
