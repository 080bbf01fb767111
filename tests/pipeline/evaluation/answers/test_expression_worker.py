"""The process that compares expressions: from a thread, and when an expression takes forever."""

import threading
import time

from pipeline.evaluation.answers import expression_worker
from pipeline.evaluation.answers.expression_worker import Comparer


def test_comparer_survives_endless_expression(monkeypatch):
    comparer = Comparer()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(comparer.ask(r"\frac{6}{8}", r"\frac{9}{12}")))
    thread.start()
    thread.join()
    assert answers == [True]
    assert comparer.ask("x+") is False
    monkeypatch.setattr(expression_worker, "SECONDS_PER_QUESTION", 0.5)
    start = time.monotonic()
    assert comparer.ask("9^{9^{9^{9}}}", "2") is False
    assert time.monotonic() - start < 4  # less than math-verify's own limit: the process was killed
    monkeypatch.undo()
    assert comparer.ask("x^2-1", "(x-1)(x+1)") is True  # a new process answers
    comparer.close()
