"""Parse and compare mathematical expressions in a process of its own: `Comparer` starts it and asks it.

math-verify bounds its time by SIGALRM, which works only in a main thread, and an alarm does not interrupt one long
operation on large integers. This process is killed then, and the next question starts another one.

A line of JSON on the standard input is a question: [text] asks whether it can be parsed, [text, text] whether both are
equal. The answer is a line: true or false.
"""

import json
import os
import selectors
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

from pipeline.common.errors import UserError
from pipeline.common.optional_imports import import_optional

SECONDS_PER_OPERATION = 5  # of math-verify, for a parse or a comparison
SECONDS_PER_QUESTION = 30  # until the process is killed
SECONDS_TO_START = 120  # sympy is slow to import
ROOT = Path(__file__).parents[3]


class Comparer:
    """The process that compares, started when it is first needed. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = os.getpid()

    def ask(self, *texts: str) -> bool:
        """Return the answer to a question. It is False if there is none in time.

        Raises:
            UserError: math-verify is not installed, or the process does not start.
        """
        with self._lock:
            if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
                self._start()
            return bool(self._exchange(list(texts), SECONDS_PER_QUESTION))

    def close(self) -> None:
        """End the process, if it was started by this process."""
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _start(self) -> None:
        import_optional("math_verify")
        self.close()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        # A first comparison, which imports sympy.
        if self._exchange(["1", "1"], SECONDS_TO_START) is not True:
            raise UserError(
                f"the process that compares expressions did not start within {SECONDS_TO_START:.0f} s; "
                "run python -c 'import math_verify' to see why"
            )

    def _exchange(self, texts: list[str], seconds: float) -> object:
        """Send a question and return the answer, or None if there is none in time. The process is killed then."""
        assert self._process is not None and self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(texts) + "\n")
            self._process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                line = self._process.stdout.readline() if selector.select(seconds) else ""
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        self.close()
        return None


@lru_cache(maxsize=4096)
def _parse(text: str) -> list:
    parse = import_optional("math_verify").parse
    return parse(f"${text}$", fallback_mode="no_fallback", parsing_timeout=SECONDS_PER_OPERATION)


def answer_question(texts: list[str]) -> bool:
    """Return whether a text can be parsed, or whether two are equal. Either may be the reference."""
    parsed = [_parse(text) for text in texts]
    if not all(parsed) or len(parsed) == 1:
        return all(parsed)
    verify = import_optional("math_verify").verify
    first, second = parsed
    return any(verify(*pair, timeout_seconds=SECONDS_PER_OPERATION) for pair in ((first, second), (second, first)))


def main() -> None:
    """Answer questions until the standard input is closed."""
    for line in sys.stdin:
        try:
            answer = answer_question(json.loads(line))
        except Exception:  # sympy raises many types; an expression that breaks it equals nothing
            answer = False
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
