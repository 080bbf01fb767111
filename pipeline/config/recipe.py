"""Load a recipe (YAML) and command-line overrides into a `Config`. Each error is reported as a one-line message."""

import argparse
import difflib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from pipeline.common.errors import UserError
from pipeline.config.settings import Config

DEMO_RECIPE = Path(__file__).parent.parent / "recipes" / "demo.yaml"
ARBITRARY_KEY_PREFIXES = ("model.config.", "data.language_weights.")  # mappings with user-defined keys


def load_config(recipe: str | Path, overrides: list[str]) -> Config:
    """Load a recipe and apply overrides of the form `--any.key value`.

    Raises:
        UserError: the file is unreadable, a key is unknown (the message suggests the nearest known key), or a value
            has the wrong type or is out of range.
    """
    recipe = Path(recipe)
    tree = _read_recipe(recipe)
    _check_keys([arg[2:].split("=")[0] for arg in overrides if arg.startswith("--")], "command line")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config, "run")
    try:
        namespace: Namespace = parser.parse_object({"run": tree})
        args = [f"--run.{arg[2:]}" if arg.startswith("--") else arg for arg in overrides]
        namespace = parser.parse_args(args, namespace=namespace)
        config = parser.instantiate_classes(namespace).run
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        message = " ".join(str(error).replace("run.", "").split())
        raise UserError(f"{recipe}: {message}") from error
    _check_values(config, recipe)
    return config


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Formatter that keeps the line breaks of the description and appends types and defaults."""


def help_text(usage: str, description: str) -> str:
    """Format the help of a command that takes a recipe, with the default and description of every setting."""
    parser = ArgumentParser(usage=usage, description=description, formatter_class=_HelpFormatter, add_help=False)
    parser.add_class_arguments(Config)
    return parser.format_help()


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe ({error.strerror}); give one with --config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe must be a mapping of keys to values")
    _check_keys(list(_recipe_keys(tree)), str(path))
    return tree


def _check_keys(names: list[str], source: str) -> None:
    known = list(_known_keys(Config))
    for name in names:
        if name not in known and not name.startswith(ARBITRARY_KEY_PREFIXES):
            near = difflib.get_close_matches(name, known, n=1) or [k for k in known if k.split(".")[-1] == name]
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{source}: unknown key {name!r}{hint}")


def _known_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys of a settings dataclass, including its sections."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        yield prefix + f.name
        if is_dataclass(hints[f.name]):
            yield from _known_keys(hints[f.name], f"{prefix}{f.name}.")  # type: ignore[arg-type]


def _recipe_keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys in a recipe."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        yield name
        if isinstance(value, dict) and f"{name}." not in ARBITRARY_KEY_PREFIXES:
            yield from _recipe_keys(value, f"{name}.")


def _check_values(config: Config, recipe: Path) -> None:
    """Check the ranges and combinations that the types cannot express."""
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
        "training.embedding_learning_rate": 1 if t.embedding_learning_rate is None else t.embedding_learning_rate,
        "training.log_gradients_steps": 1 if t.log_gradients_steps is None else t.log_gradients_steps,
        "model.vocab_multiple": config.model.vocab_multiple,
        "loss.softmax_temperature": loss.softmax_temperature,
        "loss.top_k": 1 if loss.top_k is None else loss.top_k,
        "loss.infonce_temperature": loss.infonce_temperature,
        "loss.memory_budget_mb": 1 if loss.memory_budget_mb is None else loss.memory_budget_mb,
    }
    for key, value in positive.items():
        if not value > 0:
            raise UserError(f"{recipe}: {key} is {value}; it must be greater than 0")
    fractions = {
        "training.warmup_ratio": t.warmup_ratio,
        "loss.alignment_warmup_ratio": loss.alignment_warmup_ratio,
        "loss.centring_momentum": loss.centring_momentum,
    }
    for key, value in fractions.items():
        if not 0 <= value <= 1:
            raise UserError(f"{recipe}: {key} is {value}; it must be between 0 and 1")
    if loss.alignment_weight < 0:
        raise UserError(f"{recipe}: loss.alignment_weight is {loss.alignment_weight}; it must not be negative")
    if (loss.pooling == "weights") != (loss.token_weights is not None):
        raise UserError(f"{recipe}: loss.pooling 'weights' and loss.token_weights must be set together")
    for lang, value in config.data.language_weights.items():
        if not 0 < value < float("inf"):
            raise UserError(f"{recipe}: data.language_weights.{lang} is {value}; it must be greater than 0")
    if (config.model.path is None) == (config.model.config is None):
        raise UserError(
            f"{recipe}: set either model.path (a directory or Hub model ID) or model.config (a model to build)"
        )
    if config.model.path is None and config.data.tokenizer is None:
        raise UserError(f"{recipe}: set data.tokenizer; a model built from model.config has no tokenizer")
