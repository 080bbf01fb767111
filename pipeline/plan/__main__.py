"""Will it fit, how fast, with which settings: from configuration files alone; no weights, no GPU.

    python -m pipeline.plan --config R.yaml --nodes 16 --gpus_per_node 8 --gpu h100 [--any.key value]
    python -m pipeline.plan --config R.yaml --nodes 16 --gpu h200 --suggest

Tokens per row come from the packed shards that the recipe names. Where there are none yet, --max_seq_length and
--rows say what they will be.
"""

import argparse
import json
import sys

from rich.console import Console

from pipeline.common.errors import UserError, exit_cleanly
from pipeline.config.recipe import load_config
from pipeline.plan.command import make_plan, recipe_tree, show, show_suggestion, suggestion


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


if __name__ == "__main__":
    exit_cleanly(main)
