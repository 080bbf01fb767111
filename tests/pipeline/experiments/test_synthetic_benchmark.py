"""Test the synthetic benchmark: only the held-out combinations are missing from the training data."""

import random
from itertools import chain

import pytest

from data_prep.records import Record
from pipeline.experiments.study import finetuning_groups, pretraining_groups
from pipeline.experiments.synthetic_benchmark import (
    LOW,
    MID,
    NUM_CLASSES,
    NUM_VERBS,
    OPERATORS,
    SHARED_TOKENS,
    SYNTHETIC_LANGUAGES,
    SYNTHETIC_PIVOT,
    SyntheticBenchmark,
    compute,
)


@pytest.fixture(scope="module")
def benchmark() -> SyntheticBenchmark:
    return SyntheticBenchmark(7)


def solution(record: Record) -> str:
    return record.messages[-1]["content"]


def shown_combinations(benchmark: SyntheticBenchmark, record: Record) -> set[tuple[int, int]]:
    """Return the combinations of verb and class in a solved record, parsed from its words."""
    language = benchmark.languages[record.lang]
    combinations = set()
    for clause in solution(record).split(" . ")[1:-1]:
        words = clause.split()
        verb = next(language.verbs.index(w) for w in words if w in language.verbs)
        noun = next(language.nouns.index(w) for w in words if w in language.nouns)
        operator = next(w for w in words if w in OPERATORS)
        assert operator == benchmark.operator(verb, noun)
        combinations.add((verb, noun % NUM_CLASSES))
    return combinations


def test_finetuning_groups_show_half_of_combinations_in_low(benchmark):
    groups = finetuning_groups(benchmark, amount=400, mid_problems=300)
    shown: dict[str, set] = {lang: set() for lang in SYNTHETIC_LANGUAGES}
    for record in chain.from_iterable(groups):
        shown[record.lang] |= shown_combinations(benchmark, record)
    everything = {(verb, c) for verb in range(NUM_VERBS) for c in range(NUM_CLASSES)}
    for lang in (SYNTHETIC_PIVOT, *MID):
        assert shown[lang] == everything
    for lang in LOW:
        assert shown[lang] == {(verb, benchmark.seen_class[lang][verb]) for verb in range(NUM_VERBS)}


def test_pretraining_groups_never_solve_low_resource_problems(benchmark):
    records = [group[0] for group in pretraining_groups(benchmark, 2000)]
    assert {record.lang for record in records} == set(SYNTHETIC_LANGUAGES)
    assert not any(record.lang in LOW and "=" in solution(record) for record in records)


@pytest.mark.parametrize("lang", LOW)
@pytest.mark.parametrize(("kind", "seen"), [("seen", True), ("unseen", False)])
def test_draw_problem_uses_requested_combinations(benchmark, lang, kind, seen):
    rng = random.Random(0)
    for _ in range(200):
        problem = benchmark.draw_problem(rng, lang, kind)
        assert all((noun % NUM_CLASSES == benchmark.seen_class[lang][verb]) is seen for verb, noun, _ in problem.steps)


def test_operators_of_a_verb_differ(benchmark):
    assert all(len(set(operators)) == NUM_CLASSES for operators in benchmark.operators)


def test_format_problem_is_correct_arithmetic(benchmark):
    rng = random.Random(1)
    for lang in SYNTHETIC_LANGUAGES:
        problem = benchmark.draw_problem(rng, lang, "all")
        question, answer = benchmark.format_problem(problem, lang)
        for clause in answer.split(" . ")[1:-1]:
            words = clause.split()
            equals = words.index("=")
            left, operator, right = words[equals - 3 : equals]
            assert compute(operator, int(left), int(right)) == int(words[equals + 1])
        assert answer.split()[-1] == str(benchmark.results(problem)[-1])
        numbers = [w for w in question.split() if w.isdigit()]
        assert numbers == [str(n) for n in (problem.first, *(n for _, _, n in problem.steps))]


def test_languages_share_no_words(benchmark):
    words = [set(language.content_words()) for language in benchmark.languages.values()]
    assert len(set().union(*words)) == sum(map(len, words))
    assert not set().union(*words) & set(SHARED_TOKENS)


def test_tokenizer_has_one_token_per_word(benchmark):
    tokenizer = benchmark.build_tokenizer()
    question, answer = benchmark.format_problem(benchmark.draw_problem(random.Random(2), "low2", "all"), "low2")
    ids = tokenizer(question + " " + answer)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.convert_ids_to_tokens(ids) == (question + " " + answer).split()


def test_benchmark_follows_from_seed():
    one, same, other = SyntheticBenchmark(3), SyntheticBenchmark(3), SyntheticBenchmark(4)
    assert finetuning_groups(one, 5, 5) == finetuning_groups(same, 5, 5) != finetuning_groups(other, 5, 5)


def test_finetuning_groups_of_larger_amount_include_smaller(benchmark):
    small, large = (finetuning_groups(benchmark, amount, 0) for amount in (3, 9))
    assert all(group in large for group in small)
