"""Demo data: parallel arithmetic word problems with a short chain of thought, from templates, the same for one seed."""

import random
from dataclasses import dataclass
from pathlib import Path

from data_prep.demo.languages import EVENTS, LANGUAGES, NAMES, NOUNS, Language
from data_prep.records import record_line
from pipeline.common.atomic_io import write_atomically
from pipeline.common.errors import UserError

PIVOT = "en"
MOST = 40  # no count on the way is larger


@dataclass(frozen=True)
class Problem:
    """A word problem in no language: who, what, how many at first (`boxes` of `first` each, or `first`), events."""

    name: str
    noun: str
    boxes: int  # 0 where the things do not come in boxes
    first: int
    events: tuple[tuple[str, int], ...]

    def without_name(self) -> tuple:
        """What makes two problems the same: train and test share none of these."""
        return self.noun, self.boxes, self.first, self.events

    def steps(self) -> list[int]:
        """The count after the start and after each event."""
        counts = [self.boxes * self.first if self.boxes else self.first]
        for event, number in self.events:
            counts.append(counts[-1] + EVENTS[event] * number)
        return counts


def draw_problems(number: int, seed: int) -> list[Problem]:
    """Distinct problems of one to three steps."""
    rng = random.Random(f"demo problems {seed}")
    seen: set[tuple] = set()
    problems: list[Problem] = []
    while len(problems) < number:
        boxes = rng.randint(2, 5) if rng.random() < 0.3 else 0
        first = rng.randint(2, 9) if boxes else rng.randint(2, 20)
        length = rng.randint(0 if boxes else 1, 2 if boxes else 3)
        events = tuple((rng.choice(list(EVENTS)), rng.randint(2, 9)) for _ in range(length))
        problem = Problem(rng.choice(NAMES), rng.choice(NOUNS), boxes, first, events)
        if min(problem.steps()) >= 2 and max(problem.steps()) <= MOST and problem.without_name() not in seen:
            seen.add(problem.without_name())
            problems.append(problem)
    return problems


def tell(problem: Problem, language: Language) -> tuple[str, str]:
    """A problem's question and its answer with the chain of thought, in one language."""
    fields = {**language.names[problem.name], **language.nouns[problem.noun]}
    counts = problem.steps()

    def say(template: str, number: int) -> str:
        words = dict(fields)
        if "few" in fields and 2 <= number <= 4:
            words["x"] = fields["few"]
        box = language.box_few if 2 <= problem.boxes <= 4 else language.box_many
        return template.format(**words, n=number, k=problem.boxes, box=box)

    asked = [say(language.boxes if problem.boxes else language.has, problem.first)]
    first = language.in_boxes if problem.boxes else language.start
    reasoned = [first.format(k=problem.boxes, n=problem.first, r=counts[0])]
    for (event, number), before, after in zip(problem.events, counts[:-1], counts[1:], strict=True):
        asked.append(say(language.events[event], number))
        sign = "+" if EVENTS[event] > 0 else "-"
        reasoned.append(language.after[event].format(s=f"{before} {sign} {number} = {after}"))
    asked.append(say(language.ask, 0))
    reasoned.append(language.answer.format(r=counts[-1]))
    return language.gap.join(asked), language.gap.join(reasoned)


def write_demo(
    output: Path,
    test_output: Path,
    languages: list[str],
    low_resource: list[str],
    train_problems: int = 1000,
    low_resource_problems: int = 100,
    test_problems: int = 100,
    seed: int = 0,
) -> dict[str, int]:
    """Write training problems (few in the low-resource languages) and test problems (all in every language).

    Returns the number of training records per language. Raises UserError for a language that the demo does not speak
    or counts that make no sense.
    """
    for code in [*languages, *low_resource]:
        if code not in LANGUAGES:
            raise UserError(f"unknown language {code!r}; the demo speaks {', '.join(LANGUAGES)}")
    if PIVOT not in languages:
        raise UserError(f"the pivot {PIVOT} must be among the languages")
    if PIVOT in low_resource or not set(low_resource) <= set(languages):
        raise UserError("low-resource languages must be among the languages, and not the pivot")
    if not 0 <= low_resource_problems <= train_problems <= 20_000 or not 1 <= test_problems <= 5_000:
        raise UserError("need 0 <= low_resource_problems <= train_problems <= 20000 and 1 <= test_problems <= 5000")
    problems = draw_problems(train_problems + test_problems, seed)
    counts = dict.fromkeys(languages, 0)
    train, test = [], []
    for number, problem in enumerate(problems):
        for code in languages:
            question, answer = tell(problem, LANGUAGES[code])
            gold = str(problem.steps()[-1])
            if number >= train_problems:
                test.append(record_line(f"test-{number - train_problems:05d}", code, question, answer, gold))
            elif code not in low_resource or number < low_resource_problems:
                train.append(record_line(f"train-{number:05d}", code, question, answer, gold))
                counts[code] += 1
    try:
        for path, lines in ((test_output, test), (output, train)):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(lines).encode())
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be written ({error.strerror})") from None
    return counts
