"""Demo data: parallel arithmetic word problems with a short chain of thought, reproducible from a seed."""

import random
from dataclasses import dataclass
from pathlib import Path

from data_prep.demo.languages import DEMO_LANGUAGES, EVENTS, NAMES, NOUNS, DemoLanguage
from data_prep.records import format_record, to_json_line
from pipeline.common.atomic_io import write_atomically
from pipeline.common.errors import UserError

DEMO_PIVOT = "en"
LARGEST_COUNT = 40  # limit for the start count, the intermediate results and the answer


@dataclass(frozen=True)
class DemoProblem:
    """A word problem independent of any language.

    Attributes:
        name: One of `NAMES`.
        noun: One of `NOUNS`.
        boxes: Number of boxes, 0 if there are none.
        first: Number of items at the start; per box if there are boxes.
        events: For each event, its key in `EVENTS` and the number of items.
    """

    name: str
    noun: str
    boxes: int
    first: int
    events: tuple[tuple[str, int], ...]

    def without_name(self) -> tuple:
        """Return all fields except the name. No two problems of the training and test data agree in all of them."""
        return self.noun, self.boxes, self.first, self.events

    def counts(self) -> list[int]:
        """Return the count at the start and after each event."""
        counts = [self.boxes * self.first if self.boxes else self.first]
        for event, number in self.events:
            counts.append(counts[-1] + EVENTS[event] * number)
        return counts


def draw_problems(number: int, seed: int) -> list[DemoProblem]:
    """Draw `number` distinct problems of one to three steps."""
    rng = random.Random(f"demo problems {seed}")
    seen: set[tuple] = set()
    problems: list[DemoProblem] = []
    while len(problems) < number:
        boxes = rng.randint(2, 5) if rng.random() < 0.3 else 0
        first = rng.randint(2, 9) if boxes else rng.randint(2, 20)
        length = rng.randint(0 if boxes else 1, 2 if boxes else 3)
        events = tuple((rng.choice(list(EVENTS)), rng.randint(2, 9)) for _ in range(length))
        problem = DemoProblem(rng.choice(NAMES), rng.choice(NOUNS), boxes, first, events)
        counts = problem.counts()
        if min(counts) >= 2 and max(counts) <= LARGEST_COUNT and problem.without_name() not in seen:
            seen.add(problem.without_name())
            problems.append(problem)
    return problems


def format_problem(problem: DemoProblem, language: DemoLanguage) -> tuple[str, str]:
    """Return the question and the answer (with chain of thought) of a problem in one language."""
    forms = {**language.names[problem.name], **language.nouns[problem.noun]}
    counts = problem.counts()

    def fill_in(template: str, number: int) -> str:
        fields = dict(forms)
        if "few" in forms and 2 <= number <= 4:
            fields["x"] = forms["few"]
        box = language.box_few if 2 <= problem.boxes <= 4 else language.box_many
        return template.format(**fields, n=number, k=problem.boxes, box=box)

    question = [fill_in(language.has_boxes if problem.boxes else language.has, problem.first)]
    first_step = language.in_boxes if problem.boxes else language.start
    answer = [first_step.format(k=problem.boxes, n=problem.first, r=counts[0])]
    for (event, number), before, after in zip(problem.events, counts[:-1], counts[1:], strict=True):
        question.append(fill_in(language.events[event], number))
        sign = "+" if EVENTS[event] > 0 else "-"
        answer.append(language.after[event].format(s=f"{before} {sign} {number} = {after}"))
    question.append(fill_in(language.ask, 0))
    answer.append(language.answer.format(r=counts[-1]))
    return language.gap.join(question), language.gap.join(answer)


def write_demo(
    output: Path,
    test_output: Path,
    languages: list[str],
    low_resource: list[str],
    train_problems: int,
    low_resource_problems: int,
    test_problems: int,
    seed: int,
) -> dict[str, int]:
    """Write training and test records of generated problems as canonical JSON Lines.

    Args:
        output: File of training records.
        test_output: File of test records. Every test problem is written in every language.
        languages: Language codes, the pivot "en" among them.
        low_resource: Subset of `languages` that only gets the first `low_resource_problems` training problems.
        train_problems: Number of training problems in every other language.
        low_resource_problems: Number of training problems in each low-resource language.
        test_problems: Number of test problems. They differ from all training problems.
        seed: Seed of the random problems.

    Returns:
        The number of training records per language.

    Raises:
        UserError: A language is unknown, the numbers are out of range, or a file cannot be written.
    """
    _check_languages(languages, low_resource)
    if not 0 <= low_resource_problems <= train_problems <= 20_000 or not 1 <= test_problems <= 5_000:
        raise UserError("need 0 <= low_resource_problems <= train_problems <= 20000 and 1 <= test_problems <= 5000")
    problems = draw_problems(train_problems + test_problems, seed)
    counts = dict.fromkeys(languages, 0)
    train, test = [], []
    for number, problem in enumerate(problems):
        for code in languages:
            question, answer = format_problem(problem, DEMO_LANGUAGES[code])
            is_test = number >= train_problems
            pair_id = f"test-{number - train_problems:05d}" if is_test else f"train-{number:05d}"
            fields = {"question": question, "answer": answer}
            line = to_json_line(format_record(pair_id, code, fields, gold=str(problem.counts()[-1])))
            if is_test:
                test.append(line)
            elif code not in low_resource or number < low_resource_problems:
                train.append(line)
                counts[code] += 1
    try:
        for path, lines in ((test_output, test), (output, train)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(lines).encode())
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from None
    return counts


def _check_languages(languages: list[str], low_resource: list[str]) -> None:
    for code in [*languages, *low_resource]:
        if code not in DEMO_LANGUAGES:
            raise UserError(f"unknown language {code!r}; the demo has {', '.join(DEMO_LANGUAGES)}")
    if DEMO_PIVOT not in languages:
        raise UserError(f"--languages: the pivot {DEMO_PIVOT} must be among them")
    if len(set(languages)) < len(languages):
        raise UserError(f"--languages: {max(languages, key=languages.count)} is named twice")
    if DEMO_PIVOT in low_resource or not set(low_resource) <= set(languages):
        raise UserError(f"--low_resource: must be among --languages and not contain the pivot {DEMO_PIVOT}")
