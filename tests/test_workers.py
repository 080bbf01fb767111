"""The ranks that tests share."""

import time
from typing import Any

import pytest

from tests import workers as workers_module
from tests.workers import Workers


def answer_late(group: Any, seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_a_late_answer_is_not_that_of_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Workers()
    monkeypatch.setattr(workers_module, "ANSWER_SECONDS", 0.5)
    with pytest.raises(TimeoutError, match="rank 0 did not answer"):
        ranks.run(answer_late, 2, 1.5)
    monkeypatch.undo()
    assert ranks.run(answer_late, 2, 0.0) == [0.0, 0.0]
    ranks.close()
