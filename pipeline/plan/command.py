"""Compute and show the plan of a recipe, or the fastest settings that fit."""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads a configuration here, no more

from data_prep.shards.format import MANIFEST, read_manifest
from pipeline.common.errors import UserError
from pipeline.common.hardware import load_device
from pipeline.config.recipe import load_config
from pipeline.config.settings import Config
from pipeline.models.loading import load_model_config, padded_vocab_size
from pipeline.plan.gathers import ZeroSettings
from pipeline.plan.model_facts import model_facts
from pipeline.plan.prediction import GIB, Cluster, Plan
from pipeline.plan.suggest import OFFLOADS, Choice, nearest_fit, reasons, suggest
from pipeline.plan.tables import memory_table, time_table, traffic_table
from pipeline.plan.workload import Run, Workload
from pipeline.training.preflight import check_ranks


def workload(config: Config, options: argparse.Namespace) -> tuple[Workload, int]:
    """Of the recipe's shards, or of the command line; and the tokenizer's size, 1 where it is not known."""
    shards = Path(config.data.shards)
    if (shards / MANIFEST).exists() and options.max_seq_length is None:
        manifest = read_manifest(shards)
        if not manifest["totals"]["rows"]:
            raise UserError(f"{shards}: the shards hold no rows; pack other data")
        return Workload.of_manifest(manifest), manifest["tokenizer"]["vocab_size"]
    if options.max_seq_length is None or options.rows is None:
        raise UserError(f"{shards}: no packed shards; give --max_seq_length and --rows, or pack first")
    tokens = 0.985 * options.max_seq_length  # what best-fit packing of whole groups reaches
    sequences = tokens / options.sequence_tokens
    pairs = sequences * (options.languages - 1) / options.languages
    share = options.supervised_share
    return Workload(options.max_seq_length, tokens, tokens * share, sequences, pairs, options.rows), 1


def make_plan(options: argparse.Namespace, keys: list[str]) -> tuple[Plan, dict[str, Any]]:
    """The plan and the DeepSpeed configuration that it is for.

    Raises:
        UserError: whatever does not fit together, in one line.
    """
    config = load_config(options.config, keys)
    cluster = Cluster(options.nodes, options.gpus_per_node, load_device(options.gpu))
    work, tokenizer_size = workload(config, options)
    if config.model.config is not None and tokenizer_size == 1 and "vocab_size" not in config.model.config:
        raise UserError(f"{options.config}: set model.config.vocab_size; there are no shards that would say it")
    model_config = load_model_config(config.model, tokenizer_size)
    model_config.vocab_size = padded_vocab_size(model_config.vocab_size, config.model.vocab_multiple)
    check_ranks(config.training, model_config.vocab_size, cluster.ranks)

    from pipeline.zero3.ds_config import deepspeed_config

    ds = deepspeed_config(config, cluster.ranks, device="cuda")
    device = cluster.device
    run = Run(
        config,
        model_facts(model_config),
        ZeroSettings.read(ds),
        work,
        cluster.ranks,
        mask_copies=device.attention_copies_mask,
    )
    return Plan(run, cluster), ds


def show(plan: Plan, console: Console) -> None:
    """Memory, messages, time."""
    run, device = plan.run, plan.cluster.device
    console.print(
        f"{run.facts.config.model_type}, {run.facts.parameters:,} parameters, on {plan.cluster.nodes} x "
        f"{plan.cluster.per_node} {device.name}: {run.rows} x {run.work.width} tokens per rank and micro-step, "
        f"{run.accumulation} micro-steps, head {run.head}"
    )
    console.print(memory_table(run, plan.memory))
    if plan.transfers:
        console.print(traffic_table(run, plan.cluster.per_node, plan.time.messages))
    console.print(time_table(plan))
    need, room = plan.memory.peak / GIB, plan.available / GIB
    if plan.host_bytes:
        console.print(f"The host of each node holds {plan.host_bytes / GIB:.0f} GiB.")
    if plan.fits:
        console.print(f"It fits: {need:.1f} of {room:.1f} GiB ({device.reserve_gib:g} GiB of each GPU kept free).")
        return
    if need > room:
        phase = plan.memory.peak_phase
        console.print(f"It does not fit: {need:.1f} GiB where {room:.1f} are free, at its highest in the {phase}.")
    else:
        host = f"{plan.host_bytes / GIB:.0f} GiB where it has {device.host_memory_gib:g}"
        console.print(f"It does not fit: what is offloaded takes {host} on each node's host.")
    nearest = nearest_fit(plan)
    if nearest is None:
        console.print("No setting of this recipe fits, on up to 4096 GPUs; take a larger GPU or a smaller model.")
        return
    change, other = nearest
    ratio = other.time.overlapped / plan.time.overlapped
    console.print(f"Nearest that fits: {change} ({other.memory.peak / GIB:.1f} GiB, {ratio:.2f} x the time).")


def suggestion(plan: Plan, ds: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
    """The recipe and DeepSpeed file of the fastest settings that fit.

    Raises:
        UserError: nothing fits.
    """
    found = suggest(plan)
    if found is None:
        nearest = nearest_fit(plan)
        hint = f"; {nearest[0]} would fit" if nearest else ""
        raise UserError(f"no setting fits {plan.cluster.ranks} x {plan.cluster.device.name}{hint}")
    choice, chosen = found
    return {
        "recipe": _recipe(tree, choice),
        "deepspeed": _deepspeed(ds, choice),
        "reasons": reasons(choice, chosen),
    } | {"plan": chosen.as_json()}


def _recipe(tree: dict[str, Any], choice: Choice) -> dict[str, Any]:
    recipe = json.loads(json.dumps(tree))
    recipe.setdefault("model", {})["activation_checkpointing"] = choice.checkpointing
    recipe.setdefault("loss", {}).update(head=choice.head, memory_budget_mb=choice.budget_mb)
    recipe.setdefault("training", {})["train_micro_batch_size_per_gpu"] = choice.micro
    return recipe


def _deepspeed(ds: dict[str, Any], choice: Choice) -> dict[str, Any]:
    """Without what the trainer fills in from the recipe."""
    filled = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    result = {key: value for key, value in ds.items() if key not in (*filled, "data_types")}
    zero = {key: v for key, v in ds["zero_optimization"].items() if not key.startswith("offload")}
    cpu = {"device": "cpu", "pin_memory": True}
    if choice.offload != OFFLOADS[0]:
        zero["offload_optimizer"] = cpu
    if choice.offload == OFFLOADS[2]:
        zero["offload_param"] = cpu
    return result | {"zero_optimization": zero}


def show_suggestion(found: dict[str, Any], console: Console) -> None:
    table = Table("setting", "value", "instead")
    table.columns[0].overflow = "fold"
    for row in found["reasons"]:
        table.add_row(*row)
    console.print(table)
    plan = found["plan"]
    console.print(
        f"{plan['seconds']['overlapped']:.3f} s per step, {plan['tokens_per_second']:,.0f} tokens/s, "
        f"MFU {100 * plan['mfu']:.1f} %, {plan['memory_bytes']['peak'] / GIB:.1f} GiB per GPU"
    )
    console.print("# the recipe", yaml.safe_dump(found["recipe"], sort_keys=False), sep="\n", highlight=False)
    console.print("# its DeepSpeed file", json.dumps(found["deepspeed"], indent=2), sep="\n", highlight=False)


def recipe_tree(config: Config) -> dict[str, Any]:
    """All keys that differ from the defaults, as a recipe has them."""

    def differing(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            if isinstance(value, dict) and isinstance(defaults.get(key), dict):
                value = differing(value, defaults[key])
                if value:
                    found[key] = value
            elif value != defaults.get(key):
                found[key] = list(value) if isinstance(value, tuple) else value
        return found

    return differing(asdict(config), asdict(Config()))
