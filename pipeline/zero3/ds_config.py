"""The DeepSpeed JSON of a recipe: read, checked, and filled in with what the recipe decides."""

import json
from pathlib import Path
from typing import Any

from pipeline.common.distributed import local_device
from pipeline.common.errors import UserError
from pipeline.config.settings import Config

RECIPE_KEYS = {
    "train_batch_size": "training.train_batch_size",
    "train_micro_batch_size_per_gpu": "training.train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "training.train_batch_size",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.learning_rate and its neighbours",
    "scheduler": "training.lr_scheduler_type",
}


def deepspeed_config(config: Config, ranks: int, load_universal: bool = False, device: str = "") -> dict[str, Any]:
    """The DeepSpeed JSON with what the recipe decides filled in.

    Args:
        load_universal: the engine will load a universal checkpoint, such as one of another number of ranks.
        device: cuda or cpu; none given, what is here.

    Raises:
        UserError: unreadable file, a key that belongs in the recipe, or a setting that changes what a shard is.
    """
    path = Path(config.deepspeed)
    try:
        ds: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the DeepSpeed configuration ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    for key, place in RECIPE_KEYS.items():
        if key in ds:
            raise UserError(f"{path}: take out {key!r}; it is set in the recipe, by {place}")
    zero = ds.get("zero_optimization", {})
    if zero.get("stage") != 3:
        raise UserError(f"{path}: zero_optimization.stage is {zero.get('stage')}; the sharded loss needs stage 3")
    if zero.get("offload_param", {}).get("device") == "nvme":
        raise UserError(f"{path}: offload_param.device 'nvme' is not supported; use 'cpu'")
    for key in ("zero_hpz_partition_size", "mics_shard_size", "zero_quantized_weights"):
        if zero.get(key, 0) not in (0, 1, -1, False):
            raise UserError(f"{path}: zero_optimization.{key} changes what a parameter shard is; take it out")
    training = config.training
    if training.precision == "fp16" and (device or local_device().type) == "cpu":
        raise UserError("training.precision 'fp16' needs a GPU; take bf16 or fp32 on CPU")
    for precision, key in (("bf16", "bf16"), ("fp16", "fp16")):
        enabled = ds.get(key, {}).get("enabled")
        if enabled is not None and enabled is not True and enabled is not False:
            raise UserError(f"{path}: {key}.enabled must be true or false")
        if enabled and training.precision != precision:
            raise UserError(f"{path}: enables {key} but training.precision is {training.precision}; make them agree")
    if training.precision != "fp32":
        ds.setdefault(training.precision, {})["enabled"] = True
    ds.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    if load_universal:
        ds.setdefault("checkpoint", {})["load_universal"] = True
    micro, total = training.train_micro_batch_size_per_gpu, training.train_batch_size
    return ds | {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": total // (micro * ranks),
        "gradient_clipping": training.max_grad_norm,
    }
