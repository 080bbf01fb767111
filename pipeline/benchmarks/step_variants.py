"""Variants of `pipeline.benchmarks.step`: SOLAR, variants that differ from it in one respect, and two baselines.

Each variant is a function that runs one optimizer step on a list of micro-batches.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from transformers import PreTrainedConfig

from pipeline.benchmarks.common import hooks_on_every_module, persistent_parameters_gathered_one_by_one
from pipeline.benchmarks.shapes import model_fields, published_fields
from pipeline.config.settings import Config, ModelSettings, TrainingSettings
from pipeline.data.micro_batch import MicroBatch
from pipeline.loss import LossNormalizers
from pipeline.models.loading import load_model_config

SOLAR, WEIGHT_0, MASK, MODULES, ONE_BY_ONE, TIMER, LIGER, PLAIN, TRL = STEP_VARIANTS = (
    *("solar", "weight 0", "mask", "modules", "one by one", "timer", "liger", "plain", "trl"),
)
INSTALLED = tuple(variant for variant in STEP_VARIANTS if variant not in (LIGER, TRL))  # need no other packages
LEARNING_RATE = 1e-5

TrainOnBatches = Callable[[list[MicroBatch], LossNormalizers], object]


def fields_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration fields of the model that all variants train."""
    if args.model:
        return published_fields(args.model, args.layers)
    return model_fields(args.vocab_size, args.hidden_size, args.layers, args.tied)


def recipe_of(args: argparse.Namespace) -> Config:
    """Return the recipe of `args.variant`."""
    return Config(
        deepspeed=args.deepspeed,
        model=ModelSettings(
            config=fields_of(args),
            attn_implementation="sdpa" if args.variant in (PLAIN, MASK) else None,
            use_liger_kernel=args.variant == LIGER,
            activation_checkpointing=args.activation_checkpointing,
        ),
        training=TrainingSettings(
            train_batch_size=args.rows * args.ranks * args.micro_batches,
            train_micro_batch_size_per_gpu=args.rows,
            precision=args.precision,
        ),
    )


def deepspeed_config_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the DeepSpeed configuration of `args.variant`."""
    from pipeline.zero3.ds_config import deepspeed_config

    ds = deepspeed_config(recipe_of(args), args.ranks, args.hidden_size, max_steps=1)
    if args.variant == TIMER:
        ds["timers"]["throughput"]["enabled"] = True
    return ds


def build_variant(args: argparse.Namespace) -> TrainOnBatches:
    """Build the engine of `args.variant` on this rank and return its optimizer step."""
    config, ds = recipe_of(args), deepspeed_config_of(args)
    model_config = load_model_config(config.model, 1)
    if args.variant == PLAIN:
        from pipeline.benchmarks.step_baseline import PlainEngine

        plain = PlainEngine(config, ds, model_config, LEARNING_RATE)
        return lambda micro_batches, _: [plain.step(batch, 1.0) for batch in micro_batches]
    return _build_solar(args, config, ds, model_config)


def _build_solar(
    args: argparse.Namespace, config: Config, ds: dict[str, Any], model_config: PreTrainedConfig
) -> TrainOnBatches:
    from pipeline.training.engine_setup import build_engine
    from pipeline.training.loop import train_step
    from pipeline.training.state import TrainState

    contexts = {ONE_BY_ONE: persistent_parameters_gathered_one_by_one, MODULES: hooks_on_every_module}
    with contexts.get(args.variant, nullcontext)():
        engine = build_engine(config, ds, model_config, model_config.vocab_size, 2)
    engine.set_learning_rate(LEARNING_RATE)
    weight, state = 0.0 if args.variant == WEIGHT_0 else 1.0, TrainState()
    return lambda micro_batches, normalizers: train_step(engine, micro_batches, weight, normalizers, state)
