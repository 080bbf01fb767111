"""Statistics of several sampled responses per question: mean accuracy, pass@k, majority vote."""

from collections.abc import Callable, Mapping, Sequence
from math import comb
from statistics import fmean, variance
from typing import Any, TypeVar

from pipeline.evaluation.accuracy import percent
from pipeline.evaluation.significance import wilson_interval

Answer = TypeVar("Answer")


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of the probability that one of `k` responses is correct (Chen et al. 2021, eq. 1).

    It is 1 - C(n - correct, k) / C(n, k): the fraction of all sets of `k` of the `n` responses with a correct one.

    Args:
        n: number of responses to a question.
        correct: number of them that are correct.
        k: at most `n`.
    """
    return 1 - comb(n - correct, k) / comb(n, k)


def majority_vote(answers: Sequence[Answer | None], equal: Callable[[Answer, Answer], bool]) -> int | None:
    """Return the index of the first response with the most frequent answer, or None if no response has an answer.

    Of several equally frequent answers, the one that was given first wins. Since the responses are exchangeable, this
    is as good as a random choice.

    Args:
        answers: the answers to one question; None is not counted.
        equal: whether two answers are the same.
    """
    votes: dict[int, int] = {}  # first index of each answer to its number of responses
    for index, answer in enumerate(answers):
        if answer is not None:
            first = next((i for i in votes if equal(_given(answers[i]), answer)), index)
            votes[first] = votes.get(first, 0) + 1
    return max(votes, key=lambda first: votes[first], default=None)


def _given(answer: Answer | None) -> Answer:
    assert answer is not None
    return answer


def mean_interval(values: Sequence[float], num_samples: int) -> tuple[float, float]:
    """Return the 95 % interval of the mean over questions of the fraction of correct responses.

    Questions are independent, the responses to one question are not. It is Wilson's interval for the number of
    independent responses that would give the mean the same variance (Korn and Graubard 1998).

    Args:
        values: fraction of correct responses to each question.
        num_samples: number of responses per question.
    """
    n, mean = len(values), fmean(values)
    spread = variance(values) / n if n > 1 else 0.0
    # Without spread, the questions may be all right or all wrong (n observations), or exactly alike. One question shows
    # no spread.
    alike = n if mean in (0, 1) or n == 1 else n * num_samples
    effective = min(mean * (1 - mean) / spread, n * num_samples) if spread else alike
    return wilson_interval(mean * effective, effective)


def sampling_metrics(rows: Sequence[Mapping[str, Any]], num_samples: int) -> dict[str, Any]:
    """Compute the metrics of several samples per question.

    Args:
        rows: rows of `generations.jsonl` with `lang`, `correct`, `vote_correct` and `samples`.
        num_samples: number of responses per question.

    Returns:
        `num_samples`. `languages`: for each language `n` (number of questions), `mean_accuracy` with its 95 % interval
        `low` to `high`, `pass_at_k` for k = 1, 2, 4, … and `num_samples`, `majority_vote` (accuracy of the most
        frequent answers), and `unfinished` (number of responses that were cut). `macro`: means over languages.
    """
    ks = [k for k in (2**i for i in range(num_samples.bit_length())) if k < num_samples] + [num_samples]
    by_language: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_language.setdefault(row["lang"], []).append(row)
    languages: dict[str, Any] = {}
    for lang, own in sorted(by_language.items()):
        counts = [sum(sample["correct"] for sample in row["samples"]) for row in own]
        low, high = mean_interval([row["correct"] for row in own], num_samples)
        languages[lang] = {
            "n": len(own),
            "mean_accuracy": fmean(row["correct"] for row in own),
            "low": low,
            "high": high,
            "pass_at_k": {str(k): fmean(pass_at_k(num_samples, count, k) for count in counts) for k in ks},
            "majority_vote": fmean(row["vote_correct"] for row in own),
            "unfinished": sum(not sample["finished"] for row in own for sample in row["samples"]),
        }
    macro = {
        "mean_accuracy": fmean(metrics["mean_accuracy"] for metrics in languages.values()),
        "pass_at_k": {str(k): fmean(metrics["pass_at_k"][str(k)] for metrics in languages.values()) for k in ks},
        "majority_vote": fmean(metrics["majority_vote"] for metrics in languages.values()),
    }
    return {"num_samples": num_samples, "languages": languages, "macro": macro}


def with_mean_accuracy(scores: dict[str, Any], sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries `languages` and `macro` of `evaluation.json` with the mean accuracy over all samples.

    Args:
        scores: the entries, computed from the majority votes.
        sampling: the result of `sampling_metrics`.
    """
    languages = {}
    for lang, score in scores["languages"].items():
        metrics = sampling["languages"][lang]
        accuracy = metrics["mean_accuracy"]
        interval = {key: metrics[key] for key in ("low", "high")}
        languages[lang] = {**score, "correct": accuracy * metrics["n"], "accuracy": accuracy, **interval}
    macro = {**scores["macro"], "accuracy": sampling["macro"]["mean_accuracy"]}
    return {**scores, "languages": languages, "macro": macro}


def sampling_table(sampling: Mapping[str, Any]) -> str:
    """Format the result of `sampling_metrics` as a Markdown table, in percent."""
    macro, n = sampling["macro"], sampling["num_samples"]
    ks = list(macro["pass_at_k"])
    header = " | ".join(f"pass@{k} %" for k in ks)
    lines = [
        f"Statistics of {n} samples per problem:\n",
        f"| language | responses | unfinished | mean accuracy % | 95 % interval | {header} | majority vote % |",
        f"|---|---:|---:|---:|---:|{'---:|' * len(ks)}---:|",
    ]
    for lang, metrics in sampling["languages"].items():
        interval = f"{percent(metrics['low'])} to {percent(metrics['high'])}"
        cells = f"{metrics['n'] * n} | {metrics['unfinished']} | {percent(metrics['mean_accuracy'])} | {interval}"
        lines.append(f"| {lang} | {cells} | {_tail(metrics, ks)} |")
    lines.append(f"| **mean of languages** | | | **{percent(macro['mean_accuracy'])}** | | {_tail(macro, ks)} |")
    return "\n".join(lines)


def _tail(metrics: Mapping[str, Any], ks: Sequence[str]) -> str:
    cells = [percent(metrics["pass_at_k"][k]) for k in ks]
    return " | ".join([*cells, percent(metrics["majority_vote"])])
