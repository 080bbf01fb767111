"""Command line options of the larger commands of preprocessing."""

import argparse
import json
from pathlib import Path
from typing import Any

from data_prep.convert.conversion import FORMATS
from data_prep.demo.languages import DEMO_LANGUAGES
from data_prep.derive import KINDS
from data_prep.packing.settings import ON_BAD_RECORD, SUPERVISE
from pipeline.common.errors import UserError


def add_demo_options(demo: argparse.ArgumentParser) -> None:
    """Add the options of `demo`."""
    demo.add_argument("--output", type=Path, required=True, help="JSON Lines file of training records")
    demo.add_argument("--test_output", type=Path, help="file of test records; OUTPUT with .test in its name by default")
    demo.add_argument("--languages", nargs="+", default=list(DEMO_LANGUAGES), help="languages to write")
    demo.add_argument("--low_resource", nargs="*", help="languages with few training problems; sw and th by default")
    demo.add_argument("--train_problems", type=int, default=1000, help="training problems of other languages")
    demo.add_argument("--low_resource_problems", type=int, default=100, help="training problems of these languages")
    demo.add_argument("--test_problems", type=int, default=100, help="test problems of every language")
    demo.add_argument("--seed", type=int, default=0, help="determines the problems")


def add_tokenizer_options(tokenizer: argparse.ArgumentParser) -> None:
    """Add the options of `tokenizer`."""
    tokenizer.add_argument("--input", type=Path, nargs="+", help="canonical records to train on")
    tokenizer.add_argument("--sentencepiece", help="trained SentencePiece model (FILE.model) to convert instead")
    tokenizer.add_argument("--output", type=Path, required=True, help="tokenizer directory to write")
    tokenizer.add_argument("--vocab_size", type=int, default=16384, help="number of tokens, special tokens included")
    tokenizer.add_argument("--alpha", type=float, default=0.5, help="sample languages in proportion to size ** alpha")
    tokenizer.add_argument(
        "--max_characters", type=int, default=100_000_000, help="maximum number of characters to train on"
    )


def add_convert_options(convert: argparse.ArgumentParser) -> None:
    """Add the options of `convert`."""
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


def add_derive_options(derive: argparse.ArgumentParser) -> None:
    """Add the options of `derive`."""
    derive.add_argument("kind", choices=KINDS, help="pairs of different examples, or questions to translate as well")
    derive.add_argument("--input", type=Path, nargs="+", required=True, help="canonical records")
    derive.add_argument("--output", type=Path, required=True, help="JSON Lines file that replaces them")
    derive.add_argument("--pivot", default="en", help="language that the others are translations of")
    derive.add_argument("--seed", type=int, default=0, help="determines the pairs of shuffled_pairs")


def add_pack_options(pack: argparse.ArgumentParser) -> None:
    """Add the options of `pack`."""
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
