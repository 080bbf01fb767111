"""Read and check the DeepSpeed JSON of a recipe, and add the settings from the recipe."""

import json
from pathlib import Path
from typing import Any

from pipeline.common.distributed import local_device
from pipeline.common.errors import UserError
from pipeline.config.settings import Config

REPOSITORY = Path(__file__).parents[2]

# Keys of a DeepSpeed JSON that must be set in the recipe instead, and the setting that replaces each.
RECIPE_KEYS = {
    "train_batch_size": "training.train_batch_size",
    "train_micro_batch_size_per_gpu": "training.train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "training.train_batch_size",
    "gradient_clipping": "training.max_grad_norm",
    "optimizer": "training.learning_rate and the adam_* settings",
    "scheduler": "training.lr_scheduler_type",
}


def deepspeed_config(config: Config, ranks: int, load_universal: bool = False, device: str = "") -> dict[str, Any]:
    """Build the complete DeepSpeed configuration of a run.

    Args:
        config: the recipe; `config.deepspeed` names the JSON file.
        ranks: the world size.
        load_universal: load the universal format, which any number of ranks can read.
        device: "cuda" or "cpu"; by default the device of this rank.

    Raises:
        UserError: the file is unreadable, or contains a key that must be set in the recipe or a setting that changes
            how parameters are partitioned.
    """
    path = Path(config.deepspeed)
    if not path.exists() and (REPOSITORY / path).exists():
        path = REPOSITORY / path
    try:
        ds: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the DeepSpeed configuration ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    for key, setting in RECIPE_KEYS.items():
        if key in ds:
            raise UserError(f"{path}: remove {key!r}; the recipe sets it by {setting}")
    zero = ds.get("zero_optimization", {})
    if zero.get("stage") != 3:
        raise UserError(f"{path}: zero_optimization.stage is {zero.get('stage')}; the sharded loss needs stage 3")
    if zero.get("offload_param", {}).get("device") == "nvme":
        raise UserError(f"{path}: offload_param.device 'nvme' is not supported; use 'cpu'")
    hpz = zero.get("zero_hpz_partition_size", 1)
    # hpZ leaves the primary partition of a parameter as it is, and adds a secondary one for backward.
    if not isinstance(hpz, int) or hpz < 1 or ranks % hpz:
        raise UserError(
            f"{path}: zero_optimization.zero_hpz_partition_size is {hpz}; it must divide the {ranks} ranks, "
            "and is usually the number of GPUs of a node"
        )
    for key in ("mics_shard_size", "zero_quantized_weights"):
        if zero.get(key, 0) not in (0, 1, -1, False):
            raise UserError(f"{path}: zero_optimization.{key} changes how parameters are partitioned; remove it")
    training = config.training
    if training.precision == "fp16" and (device or local_device().type) == "cpu":
        raise UserError("training.precision 'fp16' needs a GPU; use bf16 or fp32 on CPU")
    for precision, key in (("bf16", "bf16"), ("fp16", "fp16")):
        enabled = ds.get(key, {}).get("enabled")
        if enabled is not None and enabled is not True and enabled is not False:
            raise UserError(f"{path}: {key}.enabled must be true or false")
        if enabled and training.precision != precision:
            raise UserError(f"{path}: enables {key} but training.precision is {training.precision}; make both the same")
    if training.precision != "fp32":
        ds.setdefault(training.precision, {})["enabled"] = True
    ds.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    # The throughput timer synchronizes the device twice in each micro-step, and nothing reads it.
    ds.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    if (device or local_device().type) == "cpu":
        ds["zero_force_ds_cpu_optimizer"] = False  # see `build_optimizer`
    if load_universal:
        ds.setdefault("checkpoint", {})["load_universal"] = True
    micro, total = training.train_micro_batch_size_per_gpu, training.train_batch_size
    return ds | {
        "train_batch_size": total,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": total // (micro * ranks),
        "gradient_clipping": training.max_grad_norm,
    }
