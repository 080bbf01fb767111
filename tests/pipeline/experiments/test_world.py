"""The made-up world: what must transfer is never shown, and nothing else is hidden."""

import random
from itertools import chain

import pytest

from data_prep.records import parse_record
from pipeline.experiments.study import finetuning_groups, pretraining_groups
from pipeline.experiments.world import CLASSES, LANGUAGES, LOW, MID, PIVOT, SHARED, SIGNS, VERBS, World, compute


@pytest.fixture(scope="module")
def world() -> World:
    return World(7)


def cells(world: World, record: dict) -> set[tuple[int, int]]:
    """The (verb, class) cells that a solved record shows, read off its words."""
    speaks = world.languages[record["lang"]]
    found = set()
    for clause in record["answer"].split(" . ")[1:-1]:
        words = clause.split()
        verb = next(speaks.verbs.index(w) for w in words if w in speaks.verbs)
        noun = next(speaks.nouns.index(w) for w in words if w in speaks.nouns)
        sign = next(w for w in words if w in SIGNS)
        assert sign == world.sign(verb, noun)
        found.add((verb, noun % CLASSES))
    return found


def test_low_resource_languages_show_half_of_every_verb_and_the_pivot_all(world):
    groups = finetuning_groups(world, amount=400, mid_problems=300)
    shown = {code: set() for code in LANGUAGES}
    for record in chain.from_iterable(groups):
        shown[record["lang"]] |= cells(world, record)
    everything = {(verb, c) for verb in range(VERBS) for c in range(CLASSES)}
    for code in (PIVOT, *MID):
        assert shown[code] == everything
    for code in LOW:
        assert shown[code] == {(verb, world.seen_class[code][verb]) for verb in range(VERBS)}


def test_pretraining_never_solves_a_low_resource_problem(world):
    records = [group[0] for group in pretraining_groups(world, 2000)]
    assert {r["lang"] for r in records} == set(LANGUAGES)
    assert not any(r["lang"] in LOW and "=" in r["answer"] for r in records)


@pytest.mark.parametrize("code", LOW)
@pytest.mark.parametrize(("kind", "seen"), [("seen", True), ("unseen", False)])
def test_test_problems_are_of_the_cells_asked(world, code, kind, seen):
    chance = random.Random(0)
    for _ in range(200):
        problem = world.draw(chance, code, kind)
        assert all((noun % CLASSES == world.seen_class[code][verb]) is seen for verb, noun, _ in problem.steps)


def test_the_signs_of_a_verb_differ_so_that_the_unseen_one_cannot_be_guessed(world):
    assert all(len(set(signs)) == CLASSES for signs in world.signs)


def test_answers_compute_what_they_say(world):
    chance = random.Random(1)
    for code in LANGUAGES:
        problem = world.draw(chance, code, "all")
        question, answer = world.tell(problem, code)
        for clause in answer.split(" . ")[1:-1]:
            words = clause.split()
            at = words.index("=")
            assert compute(words[at - 2], int(words[at - 3]), int(words[at - 1])) == int(words[at + 1])
        assert answer.split()[-1] == str(world.numbers(problem)[-1])
        numbers = [w for w in question.split() if w.isdigit()]
        assert numbers == [str(n) for n in (problem.first, *(n for _, _, n in problem.steps))]


def test_languages_share_digits_and_signs_only(world):
    words = [set(language.content_words()) for language in world.languages.values()]
    assert len(set().union(*words)) == sum(map(len, words))
    assert not set().union(*words) & set(SHARED)


def test_one_token_per_word_and_the_text_comes_back(world):
    tokenizer = world.tokenizer()
    question, answer = world.tell(world.draw(random.Random(2), "low2", "all"), "low2")
    ids = tokenizer(question + " " + answer)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.convert_ids_to_tokens(ids) == (question + " " + answer).split()


def test_a_seed_decides_everything():
    one, same, other = World(3), World(3), World(4)
    assert finetuning_groups(one, 5, 5) == finetuning_groups(same, 5, 5) != finetuning_groups(other, 5, 5)
    assert all(parse_record(r) for group in finetuning_groups(one, 2, 2) for r in group)


def test_a_smaller_amount_is_a_part_of_a_larger_one(world):
    small, large = (finetuning_groups(world, amount, 0) for amount in (3, 9))
    assert all(group in large for group in small)
