"""Test the synthetic benchmark: only the held-out combinations are missing from the training data."""

import itertools
import random
from collections import Counter
from itertools import chain

import pytest

from data_prep.records import Record
from pipeline.experiments.measure import draw_questions
from pipeline.experiments.study import finetuning_groups, pretraining_groups
from pipeline.experiments.synthetic_benchmark import (
    ENDINGS,
    LOW,
    MID,
    NUM_CLASSES,
    NUM_NOUNS,
    NUM_VERBS,
    OPERATORS,
    SHARED_TOKENS,
    SYNTHETIC_LANGUAGES,
    SYNTHETIC_PIVOT,
    BenchmarkOptions,
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


def test_test_problems_are_in_no_training_data(benchmark):
    """Compare the questions in all languages, whether solved, copied or translated, with those that are tested."""
    problems = {question.problem for question in draw_questions(benchmark, 300, "any")}
    trained = [group[0] for group in pretraining_groups(benchmark, 3000)]
    trained += chain.from_iterable(finetuning_groups(benchmark, amount=300, mid_problems=300))
    questions = {record.messages[0]["content"].rsplit(" ", 1)[0] for record in trained}
    tested = {
        benchmark.format_problem(problem, lang)[0].rsplit(" ", 1)[0]
        for problem in problems
        for lang in SYNTHETIC_LANGUAGES
    }
    assert not questions & tested


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


def test_held_out_verbs_are_not_in_training_data():
    benchmark = SyntheticBenchmark(7, BenchmarkOptions(held_out="verbs"))
    shown: dict[str, set] = {lang: set() for lang in SYNTHETIC_LANGUAGES}
    for record in chain.from_iterable(finetuning_groups(benchmark, amount=200, mid_problems=300)):
        shown[record.lang] |= shown_combinations(benchmark, record)
    rng = random.Random(0)
    for lang in LOW:
        assert shown[lang] == {(verb, c) for verb in benchmark.seen_verbs[lang] for c in range(NUM_CLASSES)}
        tested = [benchmark.draw_problem(rng, lang, "unseen", test=True) for _ in range(100)]
        assert not {verb for problem in tested for verb, *_ in problem.steps} & set(benchmark.seen_verbs[lang])


def test_synonyms_are_many_to_many_and_zipf():
    benchmark = SyntheticBenchmark(7, BenchmarkOptions(synonyms=2, shared_nouns=3))
    rng = random.Random(0)
    pairs: Counter[tuple[int, int]] = Counter()
    for _ in range(1500):
        problem = benchmark.draw_problem(rng, "low1", "all")
        words = [benchmark.format_problem(problem, lang)[0].split() for lang in (SYNTHETIC_PIVOT, "low1")]
        verbs = [
            [benchmark.languages[lang].verbs.index(w) for w in text if w in benchmark.languages[lang].verbs]
            for lang, text in zip((SYNTHETIC_PIVOT, "low1"), words, strict=True)
        ]
        assert [v // 2 for v in verbs[0]] == [v // 2 for v in verbs[1]] == [verb for verb, *_ in problem.steps]
        pairs.update((a % 2, b % 2) for a, b in zip(*verbs, strict=True))
    total = pairs.total()
    for (a, b), expected in {(0, 0): 4 / 9, (0, 1): 2 / 9, (1, 0): 2 / 9, (1, 1): 1 / 9}.items():
        assert pairs[a, b] / total == pytest.approx(expected, abs=0.04)
    nouns = [language.nouns for language in benchmark.languages.values()]
    assert len({n[:6] for n in nouns}) == 1 and len({n[6:] for n in nouns}) == len(nouns)


def test_paraphrase_draws_synonyms_of_answer_anew():
    benchmark = SyntheticBenchmark(7, BenchmarkOptions(synonyms=2, paraphrase=True))
    language, rng = benchmark.languages["low1"], random.Random(0)
    pairs: Counter[tuple[int, int]] = Counter()
    for _ in range(1500):
        texts = benchmark.format_problem(benchmark.draw_problem(rng, "low1", "all"), "low1")
        asked, answered = ([language.verbs.index(w) for w in text.split() if w in language.verbs] for text in texts)
        assert [v // 2 for v in asked] == [v // 2 for v in answered]
        pairs.update((a % 2, b % 2) for a, b in zip(asked, answered, strict=True))
    for (a, b), expected in {(0, 0): 4 / 9, (0, 1): 2 / 9, (1, 0): 2 / 9, (1, 1): 1 / 9}.items():
        assert pairs[a, b] / pairs.total() == pytest.approx(expected, abs=0.04)
    copied, copy = benchmark.format_copy_task(benchmark.draw_problem(rng, "low1", "all"), "low1")
    assert [w for w in copy.split() if w in language.verbs] == [w for w in copied.split() if w in language.verbs]


def test_meanings_follow_zipf_in_every_language():
    benchmark = SyntheticBenchmark(7, BenchmarkOptions(zipf=True))
    rng = random.Random(0)
    problems = [benchmark.draw_problem(rng, SYNTHETIC_PIVOT, "all") for _ in range(3000)]
    verbs = Counter(verb for problem in problems for verb, *_ in problem.steps)
    first_nouns = Counter(problem.noun for problem in problems)
    for counts, number in ((verbs, NUM_VERBS), (first_nouns, NUM_NOUNS)):
        weights = [1 / (n + 1) for n in range(number)]
        frequencies = [counts[n] / counts.total() for n in range(number)]
        assert frequencies == pytest.approx([weight / sum(weights) for weight in weights], abs=0.03)
    seen = [benchmark.draw_problem(rng, "low1", "seen") for _ in range(500)]
    assert {verb for problem in seen for verb, *_ in problem.steps} == set(range(NUM_VERBS))


def test_answers_without_restatement_contain_one_word():
    benchmark = SyntheticBenchmark(7, BenchmarkOptions(restate=False))
    problem = benchmark.draw_problem(random.Random(0), "low1", "all")
    answer = benchmark.format_problem(problem, "low1")[1].split()
    assert [word for word in answer if word not in SHARED_TOKENS] == [benchmark.languages["low1"].answer]
    assert answer[-1] == str(benchmark.results(problem)[-1])


def test_translation_task_asks_for_the_pivots_question(benchmark):
    problem = benchmark.draw_problem(random.Random(0), "low1", "all")
    question, answer = benchmark.format_translation_task(problem, "low1")
    assert answer == benchmark.format_problem(problem, SYNTHETIC_PIVOT)[0]
    assert question.rsplit(" ", 1)[0] == benchmark.format_problem(problem, "low1")[0].rsplit(" ", 1)[0]
    assert question.split()[-1] == benchmark.languages[SYNTHETIC_PIVOT].copy


def test_subword_tokenizer_shares_tokens_between_languages():
    benchmark = SyntheticBenchmark(7, BenchmarkOptions(subwords=True))
    tokenizer, tokens = benchmark.build_tokenizer(), {}
    for lang in SYNTHETIC_LANGUAGES:
        text = " ".join(benchmark.format_problem(benchmark.draw_problem(random.Random(2), lang, "all"), lang))
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids).split() == text.split()
        words = " ".join(benchmark.languages[lang].content_words())
        tokens[lang] = set(tokenizer(words)["input_ids"])
        assert len(tokenizer(words)["input_ids"]) == 3 * len(words.split())
    assert all(len(tokens[a] & tokens[b]) > 10 for a in tokens for b in tokens)


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


def test_own_syllables_share_no_token_between_languages():
    """Signs and digits stay shared. Words of one language have syllables in common."""
    benchmark = SyntheticBenchmark(7, BenchmarkOptions(subwords=True, own_syllables=True))
    tokenizer = benchmark.build_tokenizer()
    tokens = {
        lang: [token for word in language.content_words() for token in tokenizer.tokenize(word)]
        for lang, language in benchmark.languages.items()
    }
    for own, other in itertools.combinations(tokens.values(), 2):
        assert not set(own) & set(other)
    assert all(len(set(own)) < len(own) for own in tokens.values())


def test_words_with_stems_are_a_stem_of_their_own_and_a_shared_ending():
    benchmark = SyntheticBenchmark(7, BenchmarkOptions(stems=True))
    tokenizer = benchmark.build_tokenizer()
    tokens = {
        lang: [tokenizer.tokenize(word) for word in language.content_words()]
        for lang, language in benchmark.languages.items()
    }
    stems = [stem for words in tokens.values() for stem, _ in words]
    assert len(set(stems)) == len(stems)
    endings = [{ending for _, ending in words} for words in tokens.values()]
    assert set.union(*endings) == set(ENDINGS) and all(len(own & other) > 3 for own in endings for other in endings)
    text = " ".join(benchmark.format_problem(benchmark.draw_problem(random.Random(2), "low1", "all"), "low1"))
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids).split() == text.split()
