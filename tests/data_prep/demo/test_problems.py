"""Generated word problems and the files of the demo."""

import json
import re

import pytest

from data_prep.demo.languages import DEMO_LANGUAGES
from data_prep.demo.problems import DEMO_PIVOT, draw_problems, format_problem, write_demo
from data_prep.records import parse_record
from pipeline.common.errors import UserError


def test_write_demo_is_reproducible_from_seed(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_demo(tmp_path / name, tmp_path / f"{name}.test", list(DEMO_LANGUAGES), ["sw"], 30, 5, 10, seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a.test").read_bytes() == (tmp_path / "b.test").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_write_demo_limits_low_resource_languages(tmp_path):
    counts = write_demo(tmp_path / "a", tmp_path / "b", ["en", "de", "sw"], ["sw"], 50, 7, 10, seed=0)
    assert counts == {"en": 50, "de": 50, "sw": 7}
    records = [parse_record(json.loads(line)) for line in (tmp_path / "a").read_text("utf-8").splitlines()]
    with_pivot = {record.pair_id for record in records if record.lang == DEMO_PIVOT}
    assert {record.pair_id for record in records} == with_pivot


def test_draw_problems_are_distinct_without_names():
    keys = [problem.without_name() for problem in draw_problems(1500, 0)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("code", DEMO_LANGUAGES)
def test_format_problem_calculates_gold_answer(code):
    for problem in draw_problems(300, 1):
        question, answer = format_problem(problem, DEMO_LANGUAGES[code])
        assert not re.search(r"[{}]", question + answer)
        for left, sign, right, result in re.findall(r"(\d+) ([-+×]) (\d+) = (\d+)", answer):
            left, right = int(left), int(right)
            assert {"+": left + right, "-": left - right, "×": left * right}[sign] == int(result)
        assert re.findall(r"\d+", answer)[-1] == str(problem.counts()[-1])
        numbers = [problem.boxes] * bool(problem.boxes) + [problem.first] + [number for _, number in problem.events]
        assert [int(number) for number in re.findall(r"\d+", question)] == numbers


def test_format_problem_inflects_russian_nouns():
    paucal, plural = ("яблока", "книги", "карандаша", "мяча", "коробки"), ("яблок", "книг", "карандашей", "мячей")
    for problem in draw_problems(500, 2):
        question, _ = format_problem(problem, DEMO_LANGUAGES["ru"])
        for number, noun in re.findall(r"(\d+) (\w+)", question):
            assert noun in (paucal if 2 <= int(number) <= 4 else (*plural, "коробок")), question


def test_write_demo_rejects_unknown_language(tmp_path):
    with pytest.raises(UserError, match="unknown language 'xx'"):
        write_demo(tmp_path / "a", tmp_path / "b", ["en", "xx"], [], 10, 5, 5, seed=0)
    assert not list(tmp_path.iterdir())
