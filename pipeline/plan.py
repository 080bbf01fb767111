"""Will it fit, how fast, with which settings: from configuration files alone; no weights, no GPU.

    python -m pipeline.plan --config R.yaml --nodes 16 --gpus_per_node 8 --gpu h100 [--any.key value]
    python -m pipeline.plan --config R.yaml --nodes 16 --gpu h200 --suggest

Tokens per row come from the packed shards that the recipe names. Where there are none yet, --max_seq_length and
--rows say what they will be.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads a configuration here, no more

from data_prep.errors import UserError, exit_cleanly
from data_prep.shards import MANIFEST, read_manifest
from pipeline.config import Config, load_config
from pipeline.hardware import load_device
from pipeline.model import load_model_config, padded_vocab_size
from pipeline.planning.gathers import ZeroSettings
from pipeline.planning.model import model_facts
from pipeline.planning.predict import GIB, Cluster, Plan
from pipeline.planning.run import Run, Workload
from pipeline.planning.suggest import OFFLOADS, Choice, nearest_fit, reasons, suggest
from pipeline.planning.tables import memory_table, time_table, traffic_table
from pipeline.prepare import check_ranks


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and the recipe's keys."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="the recipe")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--gpu", default="h100", help="h100, h200, a100, b200, or a YAML file like those")
    parser.add_argument("--suggest", action="store_true", help="search for the fastest settings that fit")
    parser.add_argument("--json", action="store_true", help="print figures for programs, in bytes and seconds")
    guess = parser.add_argument_group("where nothing is packed yet")
    guess.add_argument("--max_seq_length", type=int, help="tokens of a packed row")
    guess.add_argument("--rows", type=int, help="packed rows in all")
    guess.add_argument("--sequence_tokens", type=int, default=256, help="mean tokens of a sequence (default: 256)")
    guess.add_argument("--languages", type=int, default=8, help="sequences of a problem, pivot included (default: 8)")
    guess.add_argument("--supervised_share", type=float, default=0.6, help="of the tokens (default: 0.6)")
    options, keys = parser.parse_known_args(arguments)
    for name in ("nodes", "gpus_per_node", "max_seq_length", "rows", "sequence_tokens", "languages"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if not 0 < options.supervised_share <= 1:
        raise UserError(f"--supervised_share is {options.supervised_share}; it must lie between 0 and 1")
    return options, keys


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

    from pipeline.ds_config import deepspeed_config

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


def main() -> None:
    options, keys = parse(sys.argv[1:])
    plan, ds = make_plan(options, keys)
    console = Console()
    if options.suggest:
        config = load_config(options.config, keys)
        found = suggestion(plan, ds, recipe_tree(config))
        print(json.dumps(found, indent=2)) if options.json else show_suggestion(found, console)
    elif options.json:
        print(json.dumps(plan.as_json(), indent=2))
    else:
        show(plan, console)


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


if __name__ == "__main__":
    exit_cleanly(main)
