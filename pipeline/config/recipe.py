"""Load a recipe (YAML) and command-line overrides into a `Config`. Each error is reported as a one-line message."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, set_loader

from pipeline.common.errors import UserError
from pipeline.config.fields import check_ranges, constraints, leaf_fields, value_of
from pipeline.config.other_names import meant_by
from pipeline.config.settings import AdapterSettings, Config

DEMO_RECIPE = Path(__file__).parent.parent / "recipes" / "demo.yaml"
ARBITRARY_KEY_PREFIXES = ("model.config.", "data.language_weights.")  # mappings with user-defined keys
REQUIRED_SETTINGS = {  # if the first is set, the second must be too
    "training.eval_steps": "data.eval_shards",
    "training.metric_for_best_model": "data.eval_shards",
    "training.greater_is_better": "training.metric_for_best_model",
    "training.early_stopping_patience": "training.metric_for_best_model",
}


def load_config(recipe: str | Path, overrides: list[str]) -> Config:
    """Load a recipe and apply overrides of the form `--any.key value`.

    Raises:
        UserError: the file is unreadable, a key is unknown (the message suggests the nearest known key), or a value
            has the wrong type or is out of range.
    """
    recipe = Path(recipe)
    tree = _read_recipe(recipe)
    _check_keys([arg[2:].split("=")[0] for arg in overrides if arg.startswith("--")], "command line")
    parser = ArgumentParser(exit_on_error=False, parser_mode="recipe")
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


class RecipeLoader(yaml.SafeLoader):
    """YAML loader that reads booleans and floats as YAML 1.2 does: `no` (Norwegian) is a string and 1e-3 a number."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "float")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping. Unlike PyYAML, refuse one that has a key twice."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := next((key for i, key in enumerate(keys) if key in keys[:i]), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key {repeated!r} occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)
set_loader("recipe", lambda text: yaml.load(text, RecipeLoader), exceptions=(yaml.YAMLError,))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Formatter that keeps the line breaks of the description, and appends types, defaults and constraints."""

    def _get_help_string(self, action: argparse.Action) -> str:
        field = dict(leaf_fields()).get(action.dest)
        text = super()._get_help_string(action)
        return text if field is None else f"{text} ({constraints(field)})"


def help_text(usage: str, description: str) -> str:
    """Format the help of a command that takes a recipe, with the default and description of every setting."""
    parser = ArgumentParser(usage=usage, description=description, formatter_class=_HelpFormatter, add_help=False)
    parser.add_class_arguments(Config)
    return parser.format_help()


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), RecipeLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe ({error.strerror}); give one with --config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe must be a mapping of keys to values")
    _check_keys(list(_recipe_keys(tree)), str(path))
    _check_sections(tree, Config, path)
    return tree


def _check_sections(tree: dict[str, Any], cls: type, path: Path, prefix: str = "") -> None:
    """Check that the sections of a recipe are mappings, and replace empty ones.

    Raises:
        UserError: a section is not a mapping, or a key is dotted, which a later section of this name would undo.
    """
    if dotted := next((key for key in tree if "." in str(key)), None):
        section, _, rest = f"{prefix}{dotted}".rpartition(".")
        raise UserError(f"{path}: {prefix}{dotted} must be nested: write {rest} below {section}")
    for name, hint in get_type_hints(cls).items():
        if not is_dataclass(hint):
            continue
        if tree.get(name, {}) is None:
            tree[name] = {}  # a section whose lines are all commented out
        if not isinstance(tree.get(name, {}), dict):
            raise UserError(f"{path}: {prefix}{name} must be a mapping of keys to values, not {tree[name]!r}")
        _check_sections(tree.get(name, {}), hint, path, f"{prefix}{name}.")  # type: ignore[arg-type]


def _check_keys(names: list[str], source: str) -> None:
    known = list(_known_keys(Config))
    for name in names:
        if name.startswith("model.config.") and name.count(".") > 2:
            whole = ".".join(name.split(".")[:3])
            raise UserError(f"{source}: {name!r} is part of a mapping; give all of it: --{whole} '{{key: value, ...}}'")
        if name not in known and not name.startswith(ARBITRARY_KEY_PREFIXES):
            near = meant_by(name, known)
            hint = f"; did you mean {near!r}?" if near else ""
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
    loss = config.loss
    check_ranges(config, recipe)
    _check_adapter(config, recipe)
    _check_alignment(config, recipe)
    if (loss.pooling == "weights") != (loss.token_weights is not None):
        raise UserError(f"{recipe}: loss.pooling 'weights' and loss.token_weights must be set together")
    if loss.layer is not None and loss.pools_vocabulary:
        raise UserError(f"{recipe}: loss.layer requires loss.pooling_tokens hidden_states; set it too")
    if not loss.pools_vocabulary and set(loss.detach) - {"pivot"}:
        raise UserError(
            f"{recipe}: loss.detach has {', '.join(loss.detach)}, but with loss.pooling_tokens hidden_states only "
            "pivot can be detached; set it to [pivot] or []"
        )
    if (config.model.path is None) == (config.model.config is None):
        raise UserError(
            f"{recipe}: set either model.path (a directory or Hub model ID) or model.config (a model to build)"
        )
    if config.model.path is None and config.data.tokenizer is None:
        raise UserError(f"{recipe}: set data.tokenizer; a model built from model.config has no tokenizer")
    for key, required in REQUIRED_SETTINGS.items():
        if value_of(config, key) is not None and value_of(config, required) is None:
            raise UserError(f"{recipe}: {key} requires {required}; set it too")
    sources = 1 if isinstance(config.data.shards, str) else len(config.data.shards)
    if not config.data.shards:
        raise UserError(f"{recipe}: data.shards is empty; name at least one shard directory")
    if isinstance(config.data.shards, list) and len({Path(path).resolve() for path in config.data.shards}) < sources:
        raise UserError(f"{recipe}: data.shards names a directory twice; use data.source_weights to repeat its rows")
    if config.data.source_weights is not None and len(config.data.source_weights) != sources:
        raise UserError(
            f"{recipe}: data.source_weights has {len(config.data.source_weights)} numbers, but data.shards names "
            f"{sources} directories"
        )


def _check_adapter(config: Config, recipe: Path) -> None:
    """Check the combinations of settings that an adapter excludes."""
    adapter = config.model.adapter
    if adapter.r is None:
        if adapter != AdapterSettings():
            raise UserError(f"{recipe}: model.adapter requires model.adapter.r, the rank; peft's default is 8")
        return
    if config.model.path is None:
        raise UserError(f"{recipe}: model.adapter requires model.path; random weights are trained as a whole")
    if adapter.freezes_embeddings and config.training.embedding_learning_rate is not None:
        raise UserError(
            f"{recipe}: training.embedding_learning_rate is set, but the adapter freezes the embeddings; remove it or "
            "set model.adapter.train_embeddings"
        )


def _check_alignment(config: Config, recipe: Path) -> None:
    """Check that the alignment loss has a gradient, through the embeddings or through the probabilities."""
    loss = config.loss
    if not loss.alignment_weight or not loss.pools_vocabulary:
        return
    reasons = []
    if config.model.adapter.freezes_embeddings:
        reasons.append("the adapter freezes the embeddings (see model.adapter.train_embeddings)")
    elif "embeddings" in loss.detach:
        reasons.append("loss.detach has embeddings")
    if loss.pooling_tokens == "hard":
        reasons.append("loss.pooling_tokens is hard")
    elif "probabilities" in loss.detach:
        reasons.append("loss.detach has probabilities")
    elif loss.top_k == 1:
        reasons.append("loss.top_k is 1, with which the only probability is always 1")
    if len(reasons) == 2:
        raise UserError(
            f"{recipe}: {' and '.join(reasons)}, so nothing is aligned; change one of them, or set "
            "loss.alignment_weight to 0"
        )
