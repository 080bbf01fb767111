"""Command line of preprocessing: `python -m data_prep COMMAND --help`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.convert.conversion import FORMATS, convert
from data_prep.demo.languages import DEMO_LANGUAGES
from data_prep.derive import KINDS
from data_prep.packing.settings import ON_BAD_RECORD, SUPERVISE
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

    def work() -> None:
        manifest = pack(args.input, args.tokenizer, args.output, settings, world)
        if world.rank == 0:
            print("\n".join(report_lines(args.output, manifest)))
            print(count_repeated_pivots(ShardSet(args.output, manifest)))

    ranks.run_together(world, work)


def _read_template(name: str) -> str:
    try:
        return Path(name).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat_template {name}: cannot be read ({error})") from None


def _read_variables(text: str) -> dict[str, Any]:
    def reject(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        variables = json.loads(text, parse_constant=reject)
        json.dumps(variables, ensure_ascii=False).encode()  # refuses lone surrogates
    except ValueError as error:
        raise UserError(f"--chat_template_kwargs: not JSON ({error})") from None
    if not isinstance(variables, dict):
        raise UserError('--chat_template_kwargs: not a JSON object such as {"enable_thinking": false}')
    return variables


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

    _add_demo_options(add_command("demo", _demo, "Generate parallel arithmetic word problems from templates."))
    _add_tokenizer_options(
        add_command("tokenizer", _tokenizer, "Train a SentencePiece tokenizer with chat template, or convert one.")
    )
    _add_convert_options(add_command("convert", _convert, "Convert another format to canonical JSON Lines."))
    _add_derive_options(add_command("derive", _derive, "Derive the training data of an ablation or a baseline."))
    _add_pack_options(add_command("pack", _pack, "Tokenize, pack and write shards; also under mpirun or srun."))

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


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    demo.add_argument("--output", type=Path, required=True, help="JSON Lines file of training records")
    demo.add_argument("--test_output", type=Path, help="file of test records; OUTPUT with .test in its name by default")
    demo.add_argument("--languages", nargs="+", default=list(DEMO_LANGUAGES), help="languages to write")
    demo.add_argument("--low_resource", nargs="*", help="languages with few training problems; sw and th by default")
    demo.add_argument("--train_problems", type=int, default=1000, help="training problems of other languages")
    demo.add_argument("--low_resource_problems", type=int, default=100, help="training problems of these languages")
    demo.add_argument("--test_problems", type=int, default=100, help="test problems of every language")
    demo.add_argument("--seed", type=int, default=0, help="determines the problems")


def _add_tokenizer_options(tokenizer: argparse.ArgumentParser) -> None:
    tokenizer.add_argument("--input", type=Path, nargs="+", help="canonical records to train on")
    tokenizer.add_argument("--sentencepiece", help="trained SentencePiece model (FILE.model) to convert instead")
    tokenizer.add_argument("--output", type=Path, required=True, help="tokenizer directory to write")
    tokenizer.add_argument("--vocab_size", type=int, default=16384, help="number of tokens, special tokens included")
    tokenizer.add_argument("--alpha", type=float, default=0.5, help="sample languages in proportion to size ** alpha")
    tokenizer.add_argument(
        "--max_characters", type=int, default=100_000_000, help="maximum number of characters to train on"
    )


def _add_convert_options(convert: argparse.ArgumentParser) -> None:
    convert.add_argument("--format", required=True, choices=FORMATS, help="format of the input")
    convert.add_argument(
        "--input", nargs="+", required=True, help="files or folders in that format, or a Hub dataset ID"
    )
    convert.add_argument("--output", type=Path, required=True, help="canonical JSON Lines file to write")
    convert.add_argument("--pivot", help="language that the others are translations of; English by default")
    convert.add_argument(
        "--columns",
        nargs="*",
        default=[],
        metavar="OURS=THEIRS",
        help="column names of canonical or datasets input; {lang} stands for each of --languages",
    )
    convert.add_argument("--split", help="split of datasets input (train by default) or a benchmark (its test split)")
    convert.add_argument("--config", help="configuration of Hub input; {lang} as in --columns")
    convert.add_argument(
        "--languages", nargs="*", default=[], help="languages that {lang} stands for, or those of a benchmark to read"
    )
    convert.add_argument(
        "--unpaired",
        action="store_true",
        help="keep examples without a translation; rows without a language are in that of --pivot",
    )


def _add_derive_options(derive: argparse.ArgumentParser) -> None:
    derive.add_argument("kind", choices=KINDS, help="pairs of different examples, or questions to translate as well")
    derive.add_argument("--input", type=Path, nargs="+", required=True, help="canonical records")
    derive.add_argument("--output", type=Path, required=True, help="JSON Lines file that replaces them")
    derive.add_argument("--pivot", default="en", help="language that the others are translations of")
    derive.add_argument("--seed", type=int, default=0, help="determines the pairs of shuffled_pairs")


def _add_pack_options(pack: argparse.ArgumentParser) -> None:
    pack.add_argument(
        "--input", type=Path, nargs="+", required=True, help="canonical records: .jsonl or .parquet files"
    )
    pack.add_argument("--tokenizer", required=True, help="tokenizer directory or Hub model ID, with a chat template")
    pack.add_argument("--output", type=Path, required=True, help="shard directory to write")
    pack.add_argument("--max_seq_length", type=int, default=2048, help="maximum number of tokens in a row")
    pack.add_argument("--pivot", default="en", help="language that every group must have")
    pack.add_argument("--seed", type=int, default=0, help="determines the order of groups and rows")
    pack.add_argument("--max_sequences_per_row", type=int, default=0, help="0 for no limit")
    pack.add_argument(
        "--translations_per_row", type=int, default=0, help="of one example, whose pivot is repeated; 0 for no limit"
    )
    pack.add_argument("--pairs_only", action="store_true", help="drop examples of which no translation is left")
    pack.add_argument(
        "--truncate", action="store_true", help="truncate pairs that are too long for a row instead of dropping them"
    )
    pack.add_argument(
        "--supervise", choices=SUPERVISE, default="all", help="responses of a conversation to train on: all or the last"
    )
    pack.add_argument(
        "--on_bad_record",
        choices=ON_BAD_RECORD,
        default="error",
        help="stop at a record that cannot be packed, or drop and count it",
    )
    pack.add_argument(
        "--chat_template", type=_read_template, metavar="FILE", help="Jinja template to use instead of the tokenizer's"
    )
    pack.add_argument(
        "--chat_template_kwargs",
        type=_read_variables,
        default={},
        metavar="JSON",
        help="""variables of the chat template, such as '{"enable_thinking": false}'""",
    )
    pack.add_argument("--rows_per_shard", type=int, default=1024, help="number of rows in every shard except the last")
    pack.add_argument(
        "--window_bytes", type=int, default=0, help="input bytes packed together; 0: depends on the input size"
    )


def main() -> None:
    args = _build_parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    exit_cleanly(main)
