"""DeepSpeed files that are completed, and ones that are refused in one line that says what to change."""

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.config import get_timers_config

from pipeline.common.errors import UserError
from pipeline.config.recipe import load_config
from pipeline.zero3.ds_config import deepspeed_config
from tests.runs import write_recipe

HUGGING_FACE = {  # the shape of the ZeRO-3 example in transformers' documentation
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
ZERO3: dict = {"zero_optimization": {"stage": 3}}


def build(tmp_path: Path, content: dict, ranks: int = 2, **changes: object) -> dict[str, Any]:
    """Build the configuration of the test recipe (batch 4, fp32, 5 steps) from a DeepSpeed file."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(content))
    recipe = write_recipe(tmp_path / "run.yaml", tmp_path, tmp_path, deepspeed=str(file), **changes)
    return deepspeed_config(load_config(recipe, []), ranks, 32, 5)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"zero_optimization": {"stage": 2}}, ["stage is 2", "stage 3"]),
        ({"zero_optimization": "auto"}, ["zero_optimization is 'auto', not a JSON object"]),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, ["zero_optimization.offload_param is 'cpu'"]),
        (
            {"train_batch_size": 8} | ZERO3,
            ["train_batch_size is 8", "training.train_batch_size sets it to 4", "another DeepSpeed file"],
        ),
        ({"gradient_clipping": 0.5} | ZERO3, ["gradient_clipping is 0.5", "training.max_grad_norm sets it to 1.0"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, ["hpz_partition_size is 8", "2 ranks"]),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, ["mics_shard_size is 2", "remove it"]),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, ["zero_quantized_weights is True"]),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}},
            ["nontrainable_weights is T"],
        ),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"ratio": 0.5}}}, ["offload_optimizer.ratio is 0.5"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"super_offload": True}}}, ["super_offload is True"]),
        ({"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 9}}, ["_threshold is 9", "layers"]),
        ({"zero_optimization": {"stage": 3, "zenflow": {"topk_ratio": 0.1}}}, ["zero_optimization.zenflow is {'topk"]),
        ({"gradient_predivide_factor": 2.0} | ZERO3, ["gradient_predivide_factor is 2.0", "scatters"]),
        ({"tensor_parallel": {"autotp_size": 2}} | ZERO3, ["tensor_parallel.autotp_size is 2"]),
        ({"tensor_parallel": 2} | ZERO3, ["tensor_parallel is 2, not a JSON object"]),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}} | ZERO3, ["autocast.enabled is True", "precision"]),
        ({"progressive_layer_drop": {"enabled": True}} | ZERO3, ["ds.json: DeepSpeed refuses it (Progressive Layer"]),
        ({"flops_profiler": 3} | ZERO3, ["ds.json: DeepSpeed refuses it ("]),
        ({"activation_checkpointing": 3} | ZERO3, ["activation_checkpointing is 3, not a JSON object"]),
        ({"activation_checkpointing": {"cpu_checkpointing": True}} | ZERO3, ["cpu_checkpointing is True", "model.act"]),
        ({"expert_parallel": {"enabled": True, "autoep_size": 2}} | ZERO3, ["ds.json: expert_parallel is not a key"]),
        ({"bfloat16": {"enabled": True}} | ZERO3, ["bfloat16 is not a key", "remove it or correct its name"]),
        ({"gradient_cliping": 0.5} | ZERO3, ["ds.json: gradient_cliping is not a key"]),
        ({"fp16": {"loss_scale": "high"}} | ZERO3, ["refuses it (1 validation error for DeepSpeedFP16Config loss_sc"]),
        ({"managed_gradient_accumulation": False} | ZERO3, ["managed_gradient_accumulation is False", "micro-steps"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["offload_param.device 'nvme'"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, ["offload_optimizer.device"]),
        ({"bf16": {"enabled": True}} | ZERO3, ["bf16.enabled is True", "training.precision"]),
        ({"optimizer": {"type": "Lamb"}} | ZERO3, ["optimizer.type is 'Lamb'"]),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}} | ZERO3,
            ["optimizer.params.lr is 3e-05", "sets it to 0.003"],
        ),
        ({"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}} | ZERO3, ["params.adam_w_mode is False"]),
        ({"scheduler": {"type": "OneCycle"}} | ZERO3, ["scheduler.type is 'OneCycle'"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}} | ZERO3, ["training.warmup_ratio"]),
        (
            {"zero_optimization": {"stage": 3, "reduce_bucket_sizes": 9}},
            ["on.reduce_bucket_sizes: unknown key", "ds.json"],
        ),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "5e8"}}, ["zero_optimization.reduce_bucket_size: "]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}, ["zero_optimization.offload_param"]),
        ({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}, ['zero_optimization.sub_group_size is "auto"']),
    ],
)
def test_deepspeed_config_refuses(content: dict, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        build(tmp_path, content)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_deepspeed_config_fills_auto(tmp_path: Path, precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    ds = build(tmp_path, HUGGING_FACE, ranks=1, training__precision=precision)
    assert "optimizer" not in ds and "scheduler" not in ds
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [ds[key] for key in keys] == [4, 1, 4, 1.0]
    assert (ds["bf16"]["enabled"], ds["fp16"]["enabled"]) == (precision == "bf16", False)
    zero = ds["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (32 * 32, int(0.9 * 32 * 32))
    assert zero["stage3_param_persistence_threshold"] == 320
    assert "WarmupLR (constant) is replaced by training.lr_scheduler_type cosine" in capsys.readouterr().out
    DeepSpeedConfig(ds)  # DeepSpeed accepts every key


def test_deepspeed_config_accepts_values_of_the_recipe(tmp_path: Path) -> None:
    same = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "weight_decay": 0.1, "adam_w_mode": True}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 1, "total_num_steps": 5}},
    }
    assert build(tmp_path, same | ZERO3) == build(tmp_path, ZERO3)


@pytest.mark.parametrize(
    "key", ["autotuning", "compile", "data_efficiency", "hybrid_engine", "pipeline", "tensor_parallel_size"]
)
def test_deepspeed_config_refuses_features_that_it_would_ignore_or_break(key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"ds.json: {key} is not a key of DeepSpeed that the trainer supports; remove"):
        build(tmp_path, {key: {}} | ZERO3)


def test_deepspeed_config_accepts_features_that_are_off(tmp_path: Path) -> None:
    assert build(tmp_path, {"hybrid_engine": {"enabled": False}} | ZERO3)


def test_deepspeed_config_default_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write_recipe(tmp_path / "run.yaml", tmp_path, tmp_path), [])
    expected = deepspeed_config(config, 2, 32, 5)
    monkeypatch.chdir(tmp_path)
    assert deepspeed_config(config, 2, 32, 5) == expected
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero3.json").write_text("{}")  # a file in the working directory has precedence
    with pytest.raises(UserError, match="stage is None"):
        deepspeed_config(config, 2, 32, 5)


def test_deepspeed_config_accepts_hpz(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}))
    recipe = write_recipe(tmp_path / "run.yaml", tmp_path, tmp_path, deepspeed=str(file))
    ds = deepspeed_config(load_config(recipe, []), 4, 32, 5)
    assert ds["zero_optimization"]["zero_hpz_partition_size"] == 2


def test_deepspeed_config_accumulates_in_fp32_unless_set(tmp_path: Path) -> None:
    assert build(tmp_path, ZERO3 | {"data_types": {}})["data_types"] == {"grad_accum_dtype": "fp32"}
    other = {"data_types": {"grad_accum_dtype": "bf16"}}
    assert build(tmp_path, ZERO3 | other)["data_types"] == other["data_types"]


@pytest.mark.parametrize("universal", [False, True])
def test_deepspeed_config_loads_the_format_of_the_checkpoint(universal: bool, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"checkpoint": {"load_universal": not universal}} | ZERO3))
    recipe = write_recipe(tmp_path / "run.yaml", tmp_path, tmp_path, deepspeed=str(tmp_path / "ds.json"))
    ds = deepspeed_config(load_config(recipe, []), 1, 32, 5, load_universal=universal)
    assert DeepSpeedConfig(ds).load_universal_checkpoint == universal


@pytest.mark.parametrize("configured", [{}, {"timers": {"throughput": {"enabled": True}}}], ids=["default", "set"])
def test_deepspeed_config_disables_throughput_timer(configured: dict, tmp_path: Path) -> None:
    ds = build(tmp_path, ZERO3 | configured)
    assert get_timers_config(ds).enabled == bool(configured)


@pytest.mark.parametrize(
    ("overrides", "ranks", "zero", "expected"),
    [
        (["--model.activation_checkpointing", "false"], 4, {}, True),
        (["--model.activation_checkpointing", "true"], 4, {}, False),
        (["--model.activation_checkpointing", "true"], 4, {"memory_efficient_linear": True}, True),
        (["--model.activation_checkpointing", "false"], 1, {}, False),
        (["--model.activation_checkpointing", "false"], 1, {"offload_param": {"device": "cpu"}}, True),
    ],
    ids=["default", "checkpointing", "set", "one rank", "one rank, offloaded"],
)
def test_deepspeed_config_uses_plain_linear_layers_if_no_gathered_weights_stay(
    overrides: list[str], ranks: int, zero: dict, expected: bool, tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3} | zero}))
    recipe = write_recipe(tmp_path / "run.yaml", tmp_path, tmp_path, deepspeed=str(file))
    ds = deepspeed_config(load_config(recipe, overrides), ranks, 32, 5)
    assert DeepSpeedZeroConfig(**ds["zero_optimization"]).memory_efficient_linear == expected
