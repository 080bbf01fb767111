"""Read and check the DeepSpeed JSON of a recipe, and add the settings from the recipe.

"auto" is filled by transformers' own code, so a file that works with Hugging Face's Trainer works here.
"""

import contextlib
import copy
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from pipeline.common.distributed import is_main_process, local_device
from pipeline.common.errors import UserError
from pipeline.config.settings import Config
from pipeline.zero3.ds_support import check_keys, check_values

REPOSITORY = Path(__file__).parents[2]

# Keys of a DeepSpeed JSON that the recipe sets, and the setting behind each. Their values must be "auto" or agree.
RECIPE_KEYS = {
    "train_batch_size": "training.train_batch_size",
    "train_micro_batch_size_per_gpu": "training.train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "training.train_batch_size and the number of ranks",
    "gradient_clipping": "training.max_grad_norm",
    "bf16.enabled": "training.precision",
    "fp16.enabled": "training.precision",
    "optimizer.params.lr": "training.learning_rate",
    "optimizer.params.betas": "training.adam_beta1 and adam_beta2",
    "optimizer.params.eps": "training.adam_epsilon",
    "optimizer.params.weight_decay": "training.weight_decay",
    "scheduler.params.warmup_max_lr": "training.learning_rate",
    "scheduler.params.warmup_num_steps": "training.warmup_ratio",
    "scheduler.params.total_num_steps": "training.max_steps or num_train_epochs",
}
SECTIONS = (
    *("zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "data_types", "timers", "checkpoint"),
    *("torch_autocast", "tensor_parallel", "activation_checkpointing"),
)
OFFLOAD = ("offload_param", "offload_optimizer")
# Values of the sections that the trainer replaces, and the decay of each DeepSpeed scheduler.
OPTIMIZER_PARAMS = {"adam_w_mode": True, "torch_adam": True, "bias_correction": True}
SCHEDULER_PARAMS = {"warmup_min_lr": 0, "warmup_type": "linear"}
SCHEDULERS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


def deepspeed_config(
    config: Config,
    ranks: int,
    hidden_size: int,
    max_steps: int,
    load_universal: bool = False,
    device: str = "",
) -> dict[str, Any]:
    """Build the complete DeepSpeed configuration of a run.

    Args:
        config: the recipe; `config.deepspeed` names the JSON file.
        ranks: the world size.
        hidden_size: hidden size of the model, from which "auto" bucket sizes are computed.
        max_steps: number of optimizer steps of the run.
        load_universal: load the universal format, which any number of ranks can read.
        device: "cuda" or "cpu"; by default the device of this rank.

    Raises:
        UserError: the file is unreadable, contradicts the recipe, has keys or values that the trainer does not support,
            or is refused by DeepSpeed.
    """
    device = device or local_device().type
    path, ds = _read(config.deepspeed)
    _check_zero(path, ds, ranks)
    training = config.training
    if training.precision == "fp16" and device == "cpu":
        raise UserError("training.precision 'fp16' needs a GPU; use bf16 or fp32 on CPU")
    parts = training.sequence_parallel_size
    if ds.get("sequence_parallel_size", parts) != parts:
        raise UserError(f"{path}: sequence_parallel_size is set by the recipe, to {parts}; remove it from this file")
    ds = _fill_auto(path, ds, config, ranks // parts, hidden_size, max_steps)
    if training.precision != "fp32":
        ds.setdefault(training.precision, {})["enabled"] = True
    ds.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    # The throughput timer synchronizes the device twice in each micro-step, and nothing reads it.
    ds.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    if config.model.activation_checkpointing or not _gathers_weights(ds, ranks):
        # DeepSpeed replaces linear layers by a Python function so that the graph does not hold gathered weights. With
        # checkpointing it holds those of one layer only. The function costs host time (docs/scaling.md).
        ds["zero_optimization"].setdefault("memory_efficient_linear", False)
    if device == "cpu":
        ds["zero_force_ds_cpu_optimizer"] = False  # see `build_optimizer`
    ds.setdefault("checkpoint", {})["load_universal"] = load_universal  # replaces that of the file
    if parts > 1:
        ds["sequence_parallel_size"] = parts  # DeepSpeed reads it only to compare the three batch sizes
    micro, total = training.train_micro_batch_size_per_gpu, training.train_batch_size
    with refusals(path, Exception):  # a malformed section may raise any type
        without_sizes = {key: value for key, value in ds.items() if key not in RECIPE_KEYS}
        DeepSpeedConfig(copy.deepcopy(without_sizes) | {"train_micro_batch_size_per_gpu": 1})
    check_keys(path, ds)  # after DeepSpeed, which gives the reason for a key that it has removed
    return ds | {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": total // (micro * (ranks // parts)),
        "gradient_clipping": training.max_grad_norm,
    }


def _check_zero(path: Path, ds: dict[str, Any], ranks: int) -> None:
    """Check that the file has ZeRO-3, and none of its options that change what a rank's shard contains."""
    zero = ds.get("zero_optimization", {})
    if zero.get("stage") != 3:
        raise UserError(f"{path}: zero_optimization.stage is {zero.get('stage')}; the sharded loss needs stage 3")
    for key in OFFLOAD:
        if zero.get(key, {}).get("device") == "nvme":
            raise UserError(f"{path}: {key}.device 'nvme' is not supported; use 'cpu'")
    check_values(path, ds)
    _check_hpz(path, zero, ranks)


def _gathers_weights(ds: dict[str, Any], ranks: int) -> bool:
    """Return whether layers work on copies of the weights: gathered from other ranks, or from CPU memory."""
    return ranks > 1 or ds["zero_optimization"].get("offload_param", {}).get("device", "none") != "none"


def _check_hpz(path: Path, zero: dict[str, Any], ranks: int) -> None:
    """Raise UserError if the ranks cannot be divided into hpZ's groups."""
    hpz = zero.get("zero_hpz_partition_size", 1)
    # hpZ leaves the primary partition of a parameter as it is, and adds a secondary one for backward.
    if not isinstance(hpz, int) or hpz < 1 or ranks % hpz:
        raise UserError(
            f"{path}: zero_optimization.zero_hpz_partition_size is {hpz}; it must divide the {ranks} ranks, "
            "and is usually the number of GPUs of a node"
        )


def _read(name: str) -> tuple[Path, dict[str, Any]]:
    """Read a DeepSpeed JSON. Raises UserError if it is unreadable."""
    path = Path(name)
    if not path.exists() and (REPOSITORY / path).exists():
        path = REPOSITORY / path
    try:
        ds = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the DeepSpeed configuration ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(ds, dict):
        raise UserError(f"{path}: not a JSON object of DeepSpeed's keys")
    zero = ds.get("zero_optimization", {})
    sections = {key: ds[key] for key in SECTIONS if key in ds}
    sections |= {f"zero_optimization.{key}": zero[key] for key in OFFLOAD if isinstance(zero, dict) and key in zero}
    for key, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{path}: {key} is {section!r}, not a JSON object of DeepSpeed's keys")
    return path, ds


def _fill_auto(
    path: Path, ds: dict[str, Any], config: Config, data_parallel_size: int, hidden_size: int, max_steps: int
) -> dict[str, Any]:
    """Replace "auto" as Hugging Face's Trainer does, and drop the sections `optimizer` and `scheduler`.

    Raises:
        UserError: a value contradicts the recipe, or "auto" is not supported for a key.
    """
    training = config.training
    arguments = SimpleNamespace(
        world_size=data_parallel_size,
        per_device_train_batch_size=training.train_micro_batch_size_per_gpu,
        gradient_accumulation_steps=training.train_batch_size
        // (training.train_micro_batch_size_per_gpu * data_parallel_size),
        max_grad_norm=training.max_grad_norm,
        learning_rate=training.learning_rate,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        weight_decay=training.weight_decay,
        save_on_each_node=False,
        fp16=training.precision == "fp16",
        fp16_full_eval=False,
        bf16=training.precision == "bf16",
        bf16_full_eval=False,
        get_warmup_steps=lambda steps: round(training.warmup_ratio * steps),
    )
    _check_sections(path, ds, training.lr_scheduler_type)
    filled = HfTrainerDeepSpeedConfig(ds)
    try:
        filled.trainer_config_process(arguments)
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=hidden_size))
        filled.trainer_config_finalize(arguments, model, max_steps)
    except ValueError:
        for mismatch in filled.mismatches:
            key, value, _, expected = re.findall(r"- ds (\S+)=(.*) vs hf (.+?)=(.*)", mismatch)[0]
            setting = RECIPE_KEYS.get(key, "the recipe")
            raise UserError(
                f"{path}: {key} is {value}, but {setting} sets it to {expected}; give another DeepSpeed file, or "
                'remove the key or set it to "auto" in a copy'
            ) from None
        raise
    result = {key: value for key, value in filled.config.items() if key not in ("optimizer", "scheduler")}
    if left := next(_auto_keys(result), None):
        raise UserError(f'{path}: {left} is "auto", which Hugging Face\'s Trainer does not fill either; set a value')
    _check_zero_optimization(path, result["zero_optimization"])
    return result


def _check_zero_optimization(path: Path, zero: dict[str, Any]) -> None:
    """Raise UserError if the section has an unknown key or a value of another type."""
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *first["loc"])))
        what = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        raise UserError(f"{path}: {key}: {what}; see DeepSpeed's documentation of this section") from None


@contextlib.contextmanager
def refusals(path: str | Path, kind: type[Exception]) -> Iterator[None]:
    """Turn an exception of DeepSpeed about its configuration into a UserError that names the file."""
    try:
        yield
    except kind as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"{path}: DeepSpeed refuses it ({reason}); change the file") from error


def _check_sections(path: Path, ds: dict[str, Any], decay: str) -> None:
    """Check the types of optimizer and scheduler, and those of their parameters that transformers does not compare.

    Raises:
        UserError: the trainer has no such optimizer, schedule or parameter.
    """
    kinds = {"optimizer": ("Adam", "AdamW"), "scheduler": tuple(SCHEDULERS)}
    for section, values in (("optimizer", OPTIMIZER_PARAMS), ("scheduler", SCHEDULER_PARAMS)):
        content = ds.get(section) or {}
        if content and content.get("type") not in kinds[section]:
            raise UserError(
                f"{path}: {section}.type is {content.get('type')!r}; the trainer has its own, so use one of "
                f"{', '.join(kinds[section])}, or remove {section!r}"
            )
        for name, value in (content.get("params") or {}).items():
            key = f"{section}.params.{name}"
            if key not in RECIPE_KEYS and value not in ("auto", values.get(name)):
                raise UserError(f"{path}: {key} is {value!r}, which the trainer does not support; remove it")
    scheduler = ds.get("scheduler") or {}
    if scheduler and SCHEDULERS[scheduler["type"]] != decay:
        _print_once(
            f"note: {path}: scheduler.type {scheduler['type']} ({SCHEDULERS[scheduler['type']]}) is replaced by "
            f"training.lr_scheduler_type {decay}"
        )


def _auto_keys(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys whose value is "auto"."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _auto_keys(value, f"{prefix}{key}.")
        elif value == "auto":
            yield prefix + key


@cache
def _print_once(line: str) -> None:
    if is_main_process():
        print(line, flush=True)
