"""Benchmarks that `convert` reads by name: the files that their authors distribute and what their columns mean."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from pipeline.common.errors import UserError

Row = dict[str, Any]


def _unchanged(row: Row, lang: str) -> Row:
    return row


class Benchmark(NamedTuple):
    """The published form of a benchmark. Templates name columns in braces.

    Attributes:
        files: Path endings of its files. `{lang}` stands for a language, `{split}` for a split, `*` for any text.
        gold: Column with the answer. If there are several names, the first that a row has is used.
        question: Template of the question, without the options.
        key: Template of the key that the translations of an example share. If empty, they are the rows with the same
            number, and the files must have equally many rows (unless `unpaired`).
        unpaired: Whether the examples of its languages are not translations of each other.
        pivot: Language that the others are paired with by default.
        splits: Splits to read by default. Its Hub dataset may name them differently.
        lang: Pattern of its language names.
        languages: Language code for each language name that is not itself a code.
        header: Columns of its text files without a header. None if the first line names them.
        quoted: Whether fields of its tab-separated files may be in quotes.
        answer_type: Answer type of its records. If None, `number` where `gold` is a number, otherwise `expression`.
        choices: Templates of the options.
        first_choice: Value of `gold` for the first option.
        pivot_text: Column with the text in the pivot language, which must be the same in all languages.
        prepare: Function of a row and its language that returns the row with more columns.
    """

    files: tuple[str, ...]
    gold: tuple[str, ...] = ()
    question: str = "{question}"
    key: str = ""
    unpaired: bool = False
    pivot: str = "en"
    splits: tuple[str, ...] = ("test",)
    lang: str = "[a-z]{2,3}"
    languages: Mapping[str, str] = MappingProxyType({})
    header: tuple[str, ...] | None = None
    quoted: bool = False
    answer_type: str | None = None
    choices: tuple[str, ...] = ()
    first_choice: str = "1"
    pivot_text: str = ""
    prepare: Callable[[Row, str], Row] = _unchanged


LANGUAGE_NAMES = {
    "English": "en", "Spanish": "es", "German": "de", "French": "fr", "Russian": "ru", "Chinese": "zh",
    "Japanese": "ja", "Thai": "th", "Swahili": "sw", "Bengali": "bn", "Telugu": "te",
}  # fmt: skip
_FLORES_CODE = "[a-z]{3}_[A-Z][a-z]{3}"

# Wording of lm-evaluation-harness: what joins a premise and its cause, and a premise and its effect (tasks/xcopa).
_CONNECTORS = {
    "en": ("because", "therefore"), "et": ("sest", "seetõttu"), "ht": ("poukisa", "donk sa"),
    "id": ("karena", "maka"), "it": ("perché", "quindi"), "qu": ("imataq", "chaymi"),
    "sw": ("kwa sababu", "kwa hiyo"), "ta": ("காரணமாக", "எனவே"), "th": ("เพราะ", "ดังนั้น"),
    "tr": ("çünkü", "bu yüzden"), "vi": ("bởi vì", "vì vậy"), "zh": ("因为", "所以"),
}  # fmt: skip
# The same for paraphrases: question tag, no, yes (tasks/paws-x).
_PARAPHRASE = {
    "en": ("right", "No", "Yes"), "de": ("richtig", "Nein", "Ja"), "es": ("verdad", "No", "Sí"),
    "fr": ("n'est-ce pas", "Non", "Oui"), "ja": ("ですね", "いいえ", "はい"), "ko": ("맞죠", "아니요", "예"),
    "zh": ("对吧", "不是", "是"),
}  # fmt: skip
_SENTENCE_ENDS = " .,;。．،。"


def _prepare_xcopa(row: Row, lang: str) -> Row:
    cause, effect = _CONNECTORS.get(lang, _CONNECTORS["en"])
    connector = {"cause": cause, "effect": effect}.get(str(row.get("question")))
    premise = row.get("premise")
    return {
        **{name: value for name, value in row.items() if name != "question"},
        **({"connector": connector} if connector else {}),
        **({"premise": premise.rstrip(_SENTENCE_ENDS)} if isinstance(premise, str) else {}),
    }


def _prepare_pawsx(row: Row, lang: str) -> Row:
    tag, no, yes = _PARAPHRASE.get(lang, _PARAPHRASE["en"])
    # Sentences that the translators left out are empty or NS.
    texts: Row = {name: "" if row[name] == "NS" else row[name] for name in ("sentence1", "sentence2") if name in row}
    if isinstance(texts.get("sentence1"), str):
        texts["sentence1"] = texts["sentence1"].rstrip(_SENTENCE_ENDS)
    return {**row, **texts, "tag": tag, "no": no, "yes": yes}


def _prepare_polymath(row: Row, lang: str) -> Row:
    """Remove the language from the ID: low-te-0 becomes low-0."""
    return {**row, "id": row["id"].replace(f"-{lang}-", "-")} if isinstance(row.get("id"), str) else row


def _prepare_flores(row: Row, lang: str) -> Row:
    return {**row, "sentence": row["text"]} if "text" in row and "sentence" not in row else row  # FLORES+


def _prepare_xwinograd(row: Row, lang: str) -> Row:
    """Give a row of the authors' table the columns of the Hub dataset.

    The table has the tokens of the sentence, the pronoun as [text, [first token, end], tokens], and the candidates as
    [text, [first token, end], tokens, whether it is the referent].

    Raises UserError if a row has another form.
    """
    if "candidates" not in row:
        return row
    try:
        ((first, *_, answer), (second, *_)), (pronoun, (start, _), _) = row["candidates"], row["pronoun"]
        text, position = row["text"], 0
        for token in row["tokens"][:start]:
            if (found := text.find(token, position)) >= 0:  # the tokenizer has split some words, such as du
                position = found + len(token)
        position = text.find(pronoun, position)
    except (AttributeError, LookupError, TypeError, ValueError):
        raise UserError("not a sentence with tokens, a pronoun and two candidates") from None
    if position < 0:
        raise UserError(f"the pronoun {pronoun!r} is not at its place in the sentence")
    sentence = f"{text[:position]}_{text[position + len(pronoun) :]}"
    return {"sentence": sentence, "option1": first, "option2": second, "answer": "1" if answer else "2"}


BENCHMARKS = {
    "mgsm": Benchmark(("mgsm_{lang}.tsv",), ("answer_number", "answer"), header=("question", "answer")),
    "afrimgsm": Benchmark(
        ("{lang}/{split}.tsv",), ("answer_number", "answer"), pivot="eng", quoted=True, answer_type="number"
    ),
    "msvamp": Benchmark(
        ("test_{lang}.json",),
        ("response",),
        "{m_query}",
        lang="[A-Z][a-z]+",
        languages=LANGUAGE_NAMES,
        pivot_text="query",
    ),
    "mmath": Benchmark(("{lang}.json",), ("answer",), key="{gid}"),
    "polymath": Benchmark(
        ("{lang}/{split}.parquet", "{lang}/{split}.jsonl"),
        ("answer",),
        key="{id}",
        splits=("low", "medium", "high", "top"),
        prepare=_prepare_polymath,
    ),
    "xcopa": Benchmark(
        ("{lang}/{split}.{lang}.jsonl",),
        ("label",),
        "{premise} {connector}",
        key="{idx}",
        pivot="et",
        answer_type="choice",
        choices=("{choice1}", "{choice2}"),
        first_choice="0",
        prepare=_prepare_xcopa,
    ),
    "xwinograd": Benchmark(
        ("{lang}.jsonl", "dataset.tsv"),
        ("answer",),
        "{sentence}",
        unpaired=True,
        languages={"jp": "ja"},
        header=("lang", "source", "original", "text", "tokens", "pronoun", "candidates"),
        answer_type="choice",
        choices=("{option1}", "{option2}"),
        prepare=_prepare_xwinograd,
    ),
    "belebele": Benchmark(
        ("{lang}.jsonl",),
        ("correct_answer_num",),
        "{flores_passage}\n\n{question}",
        key="{link} {question_number}",
        pivot="eng_Latn",
        lang=_FLORES_CODE,
        answer_type="choice",
        choices=("{mc_answer1}", "{mc_answer2}", "{mc_answer3}", "{mc_answer4}"),
    ),
    "global_mmlu": Benchmark(
        ("{lang}/{split}-*.parquet",),
        ("answer",),
        key="{sample_id}",
        answer_type="choice",
        choices=("{option_a}", "{option_b}", "{option_c}", "{option_d}"),
        first_choice="A",
    ),
    "pawsx": Benchmark(
        ("{lang}/{split}_2k.tsv", "{lang}/{split}-*.parquet"),
        ("label",),
        "{sentence1}, {tag}? _, {sentence2}",
        key="{id}",
        answer_type="choice",
        choices=("{no}", "{yes}"),
        first_choice="0",
        prepare=_prepare_pawsx,
    ),
    "flores": Benchmark(
        ("{split}/{lang}.{split}", "{split}/{split}.{lang}", "{lang}/{split}-*.parquet"),
        question="",
        pivot="eng_Latn",
        splits=("devtest",),
        lang=_FLORES_CODE,
        header=("sentence",),
        prepare=_prepare_flores,
    ),
}
