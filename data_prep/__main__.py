"""Command line of preprocessing: `python -m data_prep COMMAND --help`."""

import argparse
import gc
from collections.abc import Callable
from pathlib import Path

from data_prep.convert.conversion import convert
from data_prep.options import (
    add_convert_options,
    add_demo_options,
    add_derive_options,
    add_pack_options,
    add_tokenizer_options,
)
from pipeline.common.errors import UserError, exit_cleanly


def _demo(args: argparse.Namespace) -> None:
    from data_prep.demo.problems import write_demo

    low_resource = args.low_resource
    if low_resource is None:
        low_resource = [code for code in ("sw", "th") if code in args.languages]
    test_output = args.test_output or args.output.with_name(f"{args.output.stem}.test{args.output.suffix}")
    counts = write_demo(
        output=args.output,
        test_output=test_output,
        languages=args.languages,
        low_resource=low_resource,
        train_problems=args.train_problems,
        low_resource_problems=args.low_resource_problems,
        test_problems=args.test_problems,
        seed=args.seed,
    )
    per_language = ", ".join(f"{lang} {number}" for lang, number in counts.items())
    print(f"{args.output}: {sum(counts.values())} training records ({per_language})")
    print(f"{test_output}: {args.test_problems} problems in {len(args.languages)} languages")


def _tokenizer(args: argparse.Namespace) -> None:
    from data_prep.tokenization.sampling import sample_texts
    from data_prep.tokenization.sentencepiece_models import train_tokenizer
    from data_prep.tokenization.tokenizer import fingerprint, load_tokenizer, save_tokenizer

    if args.sentencepiece:
        tokenizer = load_tokenizer(args.sentencepiece)
    elif args.input:
        tokenizer = train_tokenizer(sample_texts(args.input, args.alpha, args.max_characters), args.vocab_size)
    else:
        raise UserError("give --input (records to train on) or --sentencepiece (a trained model)")
    save_tokenizer(tokenizer, args.output)
    print(f"{args.output}: {len(tokenizer)} tokens, fingerprint {fingerprint(tokenizer)[:16]}")


def _convert(args: argparse.Namespace) -> None:
    from data_prep.convert.column_formats import FIELDS
    from data_prep.convert.examples import Source
    from data_prep.convert.input_formats import default_pivot

    columns = dict(column.partition("=")[::2] for column in args.columns)
    for name, theirs in columns.items():
        if name not in FIELDS or not theirs:
            raise UserError(f"--columns: {name}={theirs} is not OURS=THEIRS with OURS one of {', '.join(FIELDS)}")
    pivot = args.pivot or default_pivot(args.format)
    source = Source(args.input, columns, pivot, args.split, args.config, args.languages, args.unpaired)
    report = convert(args.format, source, args.output)
    print("\n".join([f"{args.output}: {report.lines()[0]}", *report.lines()[1:]]))


def _derive(args: argparse.Namespace) -> None:
    from data_prep.derive import derive

    counts = derive(args.kind, args.input, args.output, args.pivot, args.seed)
    what = "paired with another example" if args.kind == "shuffled_pairs" else "added"
    print(f"{args.output}: {counts['written']} records, {counts['changed']} of them {what}")


def _pack(args: argparse.Namespace) -> None:
    from data_prep import ranks
    from data_prep.packing.packer import pack
    from data_prep.packing.settings import PackSettings
    from data_prep.shards.format import ShardSet
    from data_prep.shards.repeated_pivots import count_repeated_pivots
    from data_prep.shards.statistics import report_lines

    ranks.exit_on_signals()
    world = ranks.start()
    settings = PackSettings(**{name: getattr(args, name) for name in PackSettings.__dataclass_fields__})
    gc.freeze()  # the garbage collector then passes over the objects of the imported libraries

    def work() -> None:
        manifest = pack(args.input, args.tokenizer, args.output, settings, world)
        if world.rank == 0:
            print("\n".join(report_lines(args.output, manifest)))
            print(count_repeated_pivots(ShardSet(args.output, manifest)))

    ranks.run_together(world, work)


def _verify(args: argparse.Namespace) -> None:
    from data_prep.shards.repeated_pivots import count_repeated_pivots
    from data_prep.shards.verification import verify

    shards = verify(args.shards, args.tokenizer)
    print(f"{args.shards}: {len(shards.manifest['shards'])} shards, {len(shards)} rows, no errors")
    print(count_repeated_pivots(shards))


def _inspect(args: argparse.Namespace) -> None:
    from data_prep.shards.inspection import inspect_row

    inspect_row(args.shards, args.tokenizer, args.row)


def _stats(args: argparse.Namespace) -> None:
    from data_prep.shards.format import ShardSet
    from data_prep.shards.repeated_pivots import count_repeated_pivots
    from data_prep.shards.statistics import plot_statistics, report_lines

    shards = ShardSet.open(args.shards, check_hashes=False)
    manifest = shards.manifest
    print("\n".join(report_lines(args.shards, manifest)))
    print(count_repeated_pivots(shards))
    if args.plot:
        plot_statistics(manifest, args.plot)


def _weights(args: argparse.Namespace) -> None:
    from data_prep.idf_weights import model_vocab_size, write_weights

    size = model_vocab_size(args.model)
    shared, absent = write_weights(args.shards, args.output, size)
    print(f"{args.output}: weights of {size} tokens, {shared} in more than one response, {absent} in none (weight 0)")


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    add_demo_options(add_command("demo", _demo, "Generate parallel arithmetic word problems from templates."))
    add_tokenizer_options(
        add_command("tokenizer", _tokenizer, "Train a SentencePiece tokenizer with chat template, or convert one.")
    )
    add_convert_options(add_command("convert", _convert, "Convert another format to canonical JSON Lines."))
    add_derive_options(add_command("derive", _derive, "Derive the training data of an ablation or a baseline."))
    add_pack_options(add_command("pack", _pack, "Tokenize, pack and write shards; also under mpirun or srun."))

    verify = add_command("verify", _verify, "Check every hash and invariant of a shard directory.")
    verify.add_argument("shards", type=Path, help="shard directory")
    verify.add_argument("--tokenizer", help="also check that this tokenizer packed the shards")

    inspect = add_command("inspect", _inspect, "Print a packed row as text, with the prompts in brackets.")
    inspect.add_argument("shards", type=Path, help="shard directory")
    inspect.add_argument("--tokenizer", required=True, help="tokenizer directory or Hub model ID")
    inspect.add_argument("--row", type=int, default=0, help="row to print, from 0")

    stats = add_command("stats", _stats, "Report languages, packing efficiency and drops of a shard directory.")
    stats.add_argument("shards", type=Path, help="shard directory")
    stats.add_argument("--plot", type=Path, help="PNG file to write a plot to")

    weights = add_command("weights", _weights, "Write vocabulary weights by inverse document frequency of responses.")
    weights.add_argument("shards", type=Path, help="shard directory")
    weights.add_argument(
        "--model", required=True, help="directory or Hub model ID of the model (or tokenizer) to train"
    )
    weights.add_argument("--output", type=Path, required=True, help="safetensors file for loss.vocabulary_weights")
    return parser


def main() -> None:
    args = _build_parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    exit_cleanly(main)
