"""Keys and values of a DeepSpeed JSON that the trainer supports. DeepSpeed accepts more, and any unknown key."""

from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError

KEYS = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("bf16", "fp16", "data_types", "torch_autocast", "optimizer", "scheduler", "activation_checkpointing"),
    *("communication_data_type", "seq_parallel_communication_data_type", "gradient_allreduce_op", "prescale_gradients"),
    *("gradient_predivide_factor", "managed_gradient_accumulation", "tensor_parallel", "sequence_parallel_size"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "timers"),
    *("flops_profiler", "comms_logger", "tensorboard", "wandb", "comet", "csv_monitor", "disable_python_gc"),
    # These change nothing, but files written for other trainers have them.
    *("aio", "checkpoint", "dataloader_drop_last", "disable_allgather", "vocabulary_size"),
}
_OWN_CHECKPOINTING = "DeepSpeed's activation checkpointing is not used, see model.activation_checkpointing"
# Supported values (the default first) of keys for which DeepSpeed accepts others, and why the trainer does not.
VALUES = {
    "managed_gradient_accumulation": ((True,), "the trainer relies on DeepSpeed to count the micro-steps"),
    "zero_optimization.offload_optimizer.ratio": ((1,), "its second optimizer would be neither scheduled nor saved"),
    "zero_optimization.offload_optimizer.super_offload": ((False,), "its optimizer's state would not be saved"),
    "zero_optimization.stage3_module_granularity_threshold": ((0,), "the trainer gathers whole decoder layers"),
    "zero_optimization.mics_shard_size": ((-1, 0), "it changes how parameters are partitioned"),
    "zero_optimization.zero_quantized_weights": ((False,), "it changes how parameters are partitioned"),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), "it changes how parameters are partitioned"),
    "zero_optimization.zenflow": ((None,), "it updates weights outside the trainer's optimizer"),
    "gradient_predivide_factor": ((1,), "ZeRO-3 scatters gradients, for which DeepSpeed does not support it"),
    "tensor_parallel.autotp_size": ((0, 1), "the trainer has no tensor parallelism"),
    "torch_autocast.enabled": ((False,), "training.precision sets the data types, with a loss scale for all gradients"),
    "activation_checkpointing.partition_activations": ((False,), _OWN_CHECKPOINTING),
    "activation_checkpointing.cpu_checkpointing": ((False,), _OWN_CHECKPOINTING),
}


def check_values(path: Path, ds: dict[str, Any]) -> None:
    """Raise UserError if a key of `VALUES` has another value."""
    for key, (supported, reason) in VALUES.items():
        *sections, name = key.split(".")
        section = ds
        for each in sections:
            section = section.get(each, {})
        if (value := section.get(name, supported[0])) not in supported:
            raise UserError(f"{path}: {key} is {value}, but {reason}; remove it")


def check_keys(path: Path, ds: dict[str, Any]) -> None:
    """Raise UserError for a key that would have no effect, such as a misspelled one, or a wrong one.

    For example, expert parallelism would replace the experts of a model, and autotuning end the run after a few steps.
    Features that are switched off, which files for other trainers list, may stay.
    """

    def is_off(value: Any) -> bool:
        return isinstance(value, dict) and value.get("enabled") is False

    if unknown := [key for key, value in ds.items() if key not in KEYS and not is_off(value)]:
        raise UserError(
            f"{path}: {unknown[0]} is not a key of DeepSpeed that the trainer supports; remove it or correct its name"
        )
