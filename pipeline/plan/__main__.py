"""Predict memory, traffic and step time of a run from its configuration files, without weights or GPU.

    python -m pipeline.plan --config R.yaml --nodes 16 --gpus_per_node 8 --gpu h100 [--any.key value]
    python -m pipeline.plan --config R.yaml --nodes 16 --gpu h200 --suggest

The statistics of the data are read from the packed shards of the recipe. If there are none yet, give --max_seq_length
and --rows instead.
"""

import argparse
import json
import sys

from pipeline.common.errors import UserError, exit_cleanly


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options of this command. The remaining arguments override keys of the recipe.

    Raises:
        UserError: an option is out of range.
    """
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="the recipe")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument(
        "--gpu", default="h100", help="a100, b200, h100, h200, rtx4090, or a YAML file with the same keys"
    )
    parser.add_argument("--suggest", action="store_true", help="search for the fastest settings that fit")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")
    data = parser.add_argument_group("if there are no packed shards yet")
    data.add_argument("--max_seq_length", type=int, help="number of tokens in a packed row")
    data.add_argument("--rows", type=int, help="number of packed rows")
    data.add_argument(
        "--sequence_tokens", type=int, default=256, help="mean number of tokens in a sequence (default: 256)"
    )
    data.add_argument(
        "--languages", type=int, default=8, help="languages per example, including the pivot (default: 8)"
    )
    data.add_argument(
        "--supervised_share", type=float, default=0.6, help="fraction of target tokens in a sequence (default: 0.6)"
    )
    options, keys = parser.parse_known_args(arguments)
    for name in ("nodes", "gpus_per_node", "max_seq_length", "rows", "sequence_tokens", "languages"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; it must be at least 1")
    if options.max_seq_length and options.sequence_tokens > options.max_seq_length:
        raise UserError(
            f"--sequence_tokens is {options.sequence_tokens}, more than the {options.max_seq_length} tokens of a row "
            "(--max_seq_length); give the mean length of your sequences"
        )
    if not 0 < options.supervised_share <= 1:
        raise UserError(f"--supervised_share is {options.supervised_share}; it must be between 0 and 1")
    return options, keys


def main() -> None:
    options, keys = parse(sys.argv[1:])

    # Slow imports, not needed for --help or an invalid option.
    from rich.console import Console

    from pipeline.plan.command import make_suggestion, predict, recipe_tree, show, show_suggestion

    prediction, ds = predict(options, keys)
    console = Console()
    if options.suggest:
        suggestion = make_suggestion(prediction, ds, recipe_tree(prediction.run.config))
        if options.json:
            print(json.dumps(suggestion, indent=2))
        else:
            show_suggestion(suggestion, console)
    elif options.json:
        print(json.dumps(prediction.as_json(), indent=2))
    else:
        show(prediction, console)


if __name__ == "__main__":
    exit_cleanly(main)
