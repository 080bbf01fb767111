"""The recipe: frozen dataclasses, read strictly from YAML and the command line; a mistake is one clear line."""

import argparse
import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from data_prep.errors import UserError
from pipeline.loss.settings import LossSettings

FREE_KEYS = ("model.config.", "data.language_weights.")  # mappings whose keys are the user's
DEMO_RECIPE = Path(__file__).parent / "recipes" / "demo.yaml"


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


def _keys(cls: type, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a dataclass, inner nodes included."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        yield prefix + f.name
        if is_dataclass(hints[f.name]):
            yield from _keys(hints[f.name], f"{prefix}{f.name}.")  # type: ignore[arg-type]


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        yield name
        if isinstance(value, dict) and f"{name}." not in FREE_KEYS:
            yield from _flat(value, f"{name}.")


def _check_keys(names: list[str], where: str) -> None:
    known = list(_keys(Config))
    for name in names:
        if name not in known and not name.startswith(FREE_KEYS):
            near = difflib.get_close_matches(name, known, n=1) or [k for k in known if k.split(".")[-1] == name]
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{where}: unknown key {name!r}{hint}")


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe ({error.strerror}); give one with --config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    _check_keys(list(_flat(tree)), str(path))
    return tree


def load_config(recipe: str | Path, overrides: list[str]) -> Config:
    """Recipe file, then `--any.key value` overrides.

    Raises:
        UserError: unreadable file, unknown key (with the nearest known one), value of a wrong type or out of range.
    """
    recipe = Path(recipe)
    tree = _read_recipe(recipe)
    _check_keys([word[2:].split("=")[0] for word in overrides if word.startswith("--")], "command line")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config, "run")
    try:
        namespace: Namespace = parser.parse_object({"run": tree})
        arguments = [f"--run.{word[2:]}" if word.startswith("--") else word for word in overrides]
        namespace = parser.parse_args(arguments, namespace=namespace)
        config = parser.instantiate_classes(namespace).run
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        message = " ".join(str(error).replace("run.", "").split())
        raise UserError(f"{recipe}: {message}") from error
    _check_values(config, recipe)
    return config


def _check_values(config: Config, recipe: Path) -> None:
    """Ranges that types do not say."""
    t, loss = config.training, config.loss
    positive = {
        "training.train_batch_size": t.train_batch_size,
        "training.train_micro_batch_size_per_gpu": t.train_micro_batch_size_per_gpu,
        "training.save_steps": t.save_steps,
        "training.save_total_limit": t.save_total_limit,
        "training.hang_timeout_s": t.hang_timeout_s,
        "training.max_loss_jump": 1 if t.max_loss_jump is None else t.max_loss_jump,
        "training.max_steps": 1 if t.max_steps is None else t.max_steps,
        "training.num_train_epochs": t.num_train_epochs,
        "training.learning_rate": t.learning_rate,
        "model.vocab_multiple": config.model.vocab_multiple,
        "loss.softmax_temperature": loss.softmax_temperature,
        "loss.infonce_temperature": loss.infonce_temperature,
        "loss.memory_budget_mb": 1 if loss.memory_budget_mb is None else loss.memory_budget_mb,
    }
    for key, value in positive.items():
        if not value > 0:
            raise UserError(f"{recipe}: {key} is {value}; it must be greater than 0")
    shares = {
        "training.warmup_ratio": t.warmup_ratio,
        "loss.alignment_warmup_ratio": loss.alignment_warmup_ratio,
        "loss.centring_momentum": loss.centring_momentum,
    }
    for key, value in shares.items():
        if not 0 <= value <= 1:
            raise UserError(f"{recipe}: {key} is {value}; it must lie between 0 and 1")
    if loss.alignment_weight < 0:
        raise UserError(f"{recipe}: loss.alignment_weight is {loss.alignment_weight}; it cannot be negative")
    if (loss.pooling == "weights") != (loss.token_weights is not None):
        raise UserError(f"{recipe}: loss.pooling 'weights' and loss.token_weights go together; set both or neither")
    for lang, value in config.data.language_weights.items():
        if not 0 < value < float("inf"):
            raise UserError(f"{recipe}: data.language_weights.{lang} is {value}; it must be greater than 0")
    if (config.model.path is None) == (config.model.config is None):
        raise UserError(f"{recipe}: set either model.path (a directory or hub id) or model.config (a model to build)")
    if config.model.path is None and config.data.tokenizer is None:
        raise UserError(f"{recipe}: set data.tokenizer; a model built from model.config has none of its own")
