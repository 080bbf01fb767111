"""Readers of the formats people have; each yields records whose pair_id tells which are translations of one problem."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.common.errors import UserError

LANGUAGE_NAMES = {
    "English": "en", "Spanish": "es", "German": "de", "French": "fr", "Russian": "ru", "Chinese": "zh",
    "Japanese": "ja", "Thai": "th", "Swahili": "sw", "Bengali": "bn", "Telugu": "te",
}  # fmt: skip
FIELDS = ("pair_id", "lang", "question", "answer", "messages", "system", "gold")


class Found(NamedTuple):
    """A record on its way: `fields` are question and answer, or messages, and maybe system."""

    pair_id: str
    lang: str
    fields: dict[str, Any]
    gold: str | None
    fault: str = ""  # why it cannot be used, where the format says so


class Source(NamedTuple):
    """What to read: files, folders or a hub id, our names for columns, the pivot, and the split of a hub dataset."""

    inputs: list[str]
    columns: dict[str, str]
    pivot: str
    split: str = "train"


Reader = Callable[[Source], Iterator[Found]]


def number_text(value: Any) -> str | None:
    """A gold answer as text by which answers compare: 8.0, "8" and "8,000" without comma; None stays None."""
    if value is None:
        return None
    text = str(value).strip()
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return text
    return str(int(number)) if number.is_integer() else str(number)


def last_number(text: str) -> str | None:
    """The last number in a text, as `number_text` has it; any script's digits."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    digits = "".join(str(int(c)) if c.isdecimal() else c for c in found[-1]) if found else None
    return number_text(digits.rstrip(",")) if digits else None


def read_canonical(source: Source) -> Iterator[Found]:
    """JSON Lines or Parquet with our columns, or others named by `columns`; chat `messages` also as from/value."""
    for path in _files(source.inputs, "*.jsonl", "*.parquet"):
        rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
        for number, row in enumerate(rows, start=1):
            yield _mapped(row, source.columns, f"{path} row {number}")


def read_datasets(source: Source) -> Iterator[Found]:
    """A folder saved by the `datasets` library, or a hub id."""
    import datasets  # heavy, and for this format alone

    for name in source.inputs:
        try:
            loaded = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
        except Exception as error:  # whatever the library raises for a damaged folder or an absent hub
            reason = str(error).split("\n")[0]
            raise UserError(f"{name}: cannot be loaded by the datasets library ({reason})") from None
        if isinstance(loaded, datasets.DatasetDict):
            if source.split not in loaded:
                raise UserError(f"{name}: no split {source.split!r}; there are {', '.join(loaded)}")
            loaded = loaded[source.split]
        for number, row in enumerate(loaded, start=1):
            yield _mapped(row, source.columns, f"{name} row {number}")


def _mapped(row: dict[str, Any], columns: dict[str, str], where: str) -> Found:
    record = {name: row.get(columns.get(name, name)) for name in FIELDS}
    for name, theirs in columns.items():
        if theirs not in row:
            raise UserError(f"{where}: no column {theirs!r}, named as {name}; there are {', '.join(map(str, row))}")
    for name in ("pair_id", "lang"):
        if record[name] is None or isinstance(record[name], list | dict | bool | float) or record[name] == "":
            raise UserError(f"{where}: no `{name}`; name its column with --columns {name}=THEIRS")
    if record["messages"] is not None:
        fields: dict[str, Any] = {"messages": _messages(record["messages"], where)}
    elif isinstance(record["question"], str) and isinstance(record["answer"], str):
        fields = {"question": record["question"], "answer": record["answer"]}
    else:
        raise UserError(f"{where}: neither `messages` nor the strings `question` and `answer`; see --columns")
    if record["system"] is not None:
        fields["system"] = str(record["system"])
    return Found(str(record["pair_id"]), str(record["lang"]), fields, number_text(record["gold"]))


def _messages(found: Any, where: str) -> list[dict[str, Any]]:
    names = {"human": "user", "gpt": "assistant"}
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise UserError(f"{where}: `messages` is not a list of {{role, content}} or {{from, value}}")
    if all("from" in message for message in found):
        found = [{"role": names.get(m["from"], m["from"]), "content": m.get("value")} for m in found]
    return found


def read_mgsm(source: Source) -> Iterator[Found]:
    """MGSM: mgsm_{lang}.tsv, question TAB answer; row i is one problem everywhere. The answer is the bare number."""
    files = {path.stem.removeprefix("mgsm_"): path for path in _files(source.inputs, "mgsm_*.tsv")}
    for number, lang, line in _aligned(files, _lines, source.pivot):
        question, tab, answer = line.rpartition("\t")
        if not tab:
            raise UserError(f"{files[lang]} row {number + 1}: not QUESTION TAB ANSWER")
        yield Found(f"mgsm-{number:06d}", lang, {"question": question, "answer": answer}, number_text(answer))


def read_msvamp(source: Source) -> Iterator[Found]:
    """MSVAMP: test_{Language}.json, JSON Lines; paired by the English question that every row carries."""
    files = {}
    for path in _files(source.inputs, "test_*.json"):
        name = path.stem.removeprefix("test_")
        if name not in LANGUAGE_NAMES:
            raise UserError(f"{path}: unknown language {name!r}; known: {', '.join(LANGUAGE_NAMES)}")
        files[LANGUAGE_NAMES[name]] = path
    english: dict[int, str] = {}
    for number, lang, row in _aligned(files, _json_rows, source.pivot):
        question, gold = _texts(row, ("m_query", "response"), f"{files[lang]} row {number + 1}")
        theirs = english.setdefault(number, row.get("query", question))
        fault = "" if row.get("query", question) in (theirs, question) else "other_english_question"
        answer = number_text(gold)
        yield Found(f"msvamp-{number:06d}", lang, {"question": question, "answer": answer}, answer, fault)


def read_mcot(source: Source) -> Iterator[Found]:
    """mCoT outputs: {lang}.jsonl; row i answers one problem everywhere, and `result` says whether rightly."""
    files = {path.stem: path for path in _files(source.inputs, "*.jsonl")}
    for number, lang, row in _aligned(files, _json_rows, source.pivot):
        prompt, response = _texts(row, ("question", "response"), f"{files[lang]} row {number + 1}")
        question = prompt.split("Question:\n", 1)[-1].rsplit("\nAnswer:", 1)[0].strip()
        fields = {"question": question, "answer": response.strip()}
        fault = "" if row.get("result") is True else "wrong_answer"
        yield Found(f"mcot-{number:06d}", lang, fields, number_text(row.get("answer")), fault)


def read_parallel(source: Source) -> Iterator[Found]:
    """Line-aligned text, NAME.{lang}: line i of every NAME.* is one text, the answer to an empty question."""
    stems: dict[str, dict[str, Path]] = {}
    for path in _files(source.inputs, "*.*"):
        stems.setdefault(path.stem, {})[path.suffix[1:]] = path
    for stem, files in stems.items():
        for number, lang, line in _aligned(files, _lines, source.pivot):
            yield Found(f"{stem}-{number:09d}", lang, {"question": "", "answer": line.strip()}, None)


_PROMPT = re.compile(r"answer in (\w+)\.?\s+### Instruction:\n(.*?)\n\n### Response:", re.DOTALL)


def read_mathoctopus(source: Source) -> Iterator[Found]:
    """MathOctopus MGSM8KInstruct: {prompt, chosen} without ids; language and question stand in the prompt.

    Rows with the pivot's very question (the Cross set) pair by it. Others (the Parallel set) pair with the one pivot
    question that has the same numbers and the same final answer; where several have, the row is dropped.
    """
    rows = [_octopus(row, where) for path in _files(source.inputs, "*.json", "*.jsonl") for row, where in _named(path)]
    pivots = [(question, gold) for lang, question, _, gold in rows if lang == source.pivot]
    by_question = {question: number for number, (question, _) in enumerate(pivots)}
    signatures = Counter(_signature(question, gold) for question, gold in pivots)
    by_signature = {_signature(*pivot): number for number, pivot in enumerate(pivots)}
    for number, (lang, question, answer, gold) in enumerate(rows):
        signature, fault = _signature(question, gold), ""
        found = by_question.get(question)
        if found is None and signatures[signature] > 1:
            fault = "ambiguous_pair"
        elif found is None and (found := by_signature.get(signature)) is None:
            fault = "no_pair_found"
        pair_id = f"octopus-{found:06d}" if not fault else f"octopus-unpaired-{number:06d}"
        yield Found(pair_id, lang, {"question": question, "answer": answer}, gold, fault)


def _octopus(row: dict[str, Any], where: str) -> tuple[str, str, str, str | None]:
    prompt, answer = _texts(row, ("prompt", "chosen"), where)
    match = _PROMPT.search(prompt)
    if not match or match[1] not in LANGUAGE_NAMES:
        raise UserError(f"{where}: the prompt names no known language; is this MGSM8KInstruct?")
    return LANGUAGE_NAMES[match[1]], match[2].strip(), answer.strip(), last_number(answer)


def _signature(question: str, gold: str | None) -> tuple:
    numbers = (last_number(found) for found in re.findall(r"\d[\d,.]*", question))
    return tuple(sorted(filter(None, numbers))), gold


def _aligned(
    files: dict[str, Path], read: Callable[[Path], Iterable[Any]], pivot: str
) -> Iterator[tuple[int, str, Any]]:
    """(row, language, content) of files whose row i belongs together, the pivot first.

    Raises UserError where the pivot's file is missing or the files differ in length.
    """
    if pivot not in files:
        raise UserError(f"no file of the pivot {pivot} among {', '.join(str(path) for path in files.values())}")
    langs = sorted(files, key=lambda lang: (lang != pivot, lang))
    for number, rows in enumerate(zip_longest(*(read(files[lang]) for lang in langs))):
        for lang, row in zip(langs, rows, strict=True):
            if row is None:
                raise UserError(f"{files[lang]}: ends at row {number}, other files go on; rows must correspond")
            yield number, lang, row


def _texts(row: dict[str, Any], names: tuple[str, str], where: str) -> tuple[str, str]:
    first, second = (row.get(name) for name in names)
    if not isinstance(first, str) or not isinstance(second, str):
        raise UserError(f"{where}: `{names[0]}` and `{names[1]}` must be strings")
    return first, second


def _files(inputs: list[str], *patterns: str) -> list[Path]:
    """The files named, and those that match in the folders named."""
    found = []
    for path in map(Path, inputs):
        if path.is_dir():
            inside = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
            if not inside:
                raise UserError(f"{path}: no {' or '.join(patterns)} in it")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    return found


def _lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise UserError(f"{path} row {number}: not UTF-8 text") from None


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    return (row for row, _ in _named(path))


def _named(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a JSON Lines file, each with its file and row."""
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path} row {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: malformed JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: not a JSON object")
        yield row, where


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        for batch in pq.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: damaged Parquet file ({reason})") from None


# Formats whose readers give the members of a group one after another, and those that do not.
IN_GROUPS: dict[str, Reader] = {"mcot": read_mcot, "mgsm": read_mgsm, "msvamp": read_msvamp, "parallel": read_parallel}
SCATTERED: dict[str, Reader] = {
    "canonical": read_canonical,
    "datasets": read_datasets,
    "mathoctopus": read_mathoctopus,
}
