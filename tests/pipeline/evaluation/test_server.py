"""Responses from `transformers serve`, killed and restarted in the middle, and from a server with scripted failures."""

import dataclasses
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from pipeline.common.errors import ServerError, UserError
from pipeline.common.exit_codes import SERVER_FAILURE, STOPPED_BY_SIGNAL
from pipeline.common.launcher import free_port
from pipeline.evaluation import server as server_module
from pipeline.evaluation.progress import Generation, GenerationLog
from pipeline.evaluation.runner import can_resume, evaluate
from pipeline.evaluation.server import Server, ServerRequest, generate_by_server
from pipeline.evaluation.settings import EvaluationSettings
from pipeline.fault_tolerance.signals import StopSignal
from tests.fork_server import ENVIRONMENT, Fork
from tests.pipeline.evaluation.tiny_model import TEMPLATE, make_records, save, write_records
from tests.runs import TINY


class TransformersServe:
    """`transformers serve MODEL`, whose processes use one port and write one log."""

    def __init__(self, model: Path, log: Path) -> None:
        self.port, self.log = free_port(), log
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._command = ["-m", "transformers.cli.transformers", "serve", str(model), "--port", str(self.port)]
        self._command += ["--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
        self._process: Fork | None = None

    def start(self) -> None:
        self._process = Fork(self._command, {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}, self.log, self.log)

    def wait_until_up(self) -> None:
        assert self._process is not None
        open_url = build_opener(ProxyHandler({})).open
        while True:
            try:
                open_url(f"http://127.0.0.1:{self.port}/health").read()
                return
            except OSError:
                assert self._process.poll() is None, self.log.read_text()
                time.sleep(0.1)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def requests(self) -> int:
        return self.log.read_text().count("[Request received]")


@pytest.fixture
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_DELAY", 0.1)
    monkeypatch.setattr(server_module, "LONGEST_DELAY", 0.5)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def read_rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "generations.jsonl").read_text("utf-8").split("\n") if line]


@pytest.mark.slow
def test_evaluate_by_server_killed_and_restarted(tmp_path, tokenizer, monkeypatch, no_delays):
    """Nothing that was answered is lost or asked again, and the responses are those of the local model."""
    chat = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", eos_token="</s>")
    chat.chat_template = TEMPLATE + "{% if enable_thinking %}<|system|>{% endif %}"
    ids = {"eos_token_id": chat.eos_token_id, "pad_token_id": chat.pad_token_id}
    # The server loads the tokenizer with AutoTokenizer, which changes that of a Qwen2.
    config = AutoConfig.for_model(**{**TINY, "model_type": "olmo2", "vocab_size": len(chat), **ids})
    config.initializer_range = 0.3
    set_seed(0)
    model = save(AutoModelForCausalLM.from_config(config), chat, tmp_path / "model")
    data = write_records(tmp_path / "x.jsonl", make_records())
    settings = EvaluationSettings(
        str(model),
        str(data),
        str(tmp_path / "served"),
        batch_size=2,
        max_new_tokens=8,
        chat_template_kwargs={"enable_thinking": True},
    )
    assert evaluate(dataclasses.replace(settings, output=str(tmp_path / "local"))) == 0

    served = TransformersServe(model, tmp_path / "serve.log")
    logged: Counter[int] = Counter()
    kills = [6, 12]  # numbers of logged responses after which the server is killed
    original = GenerationLog.add

    def add(log: GenerationLog, generations: dict[int, Generation]) -> None:
        original(log, generations)
        logged.update(list(generations))
        if kills and logged.total() >= kills[0]:
            served.kill()
            if kills.pop(0) == 12:
                served.start()

    monkeypatch.setattr(GenerationLog, "add", add)
    settings = dataclasses.replace(settings, base_url=served.url)
    served.start()
    served.wait_until_up()
    with pytest.raises(
        ServerError, match=r"no answer for 1 seconds \(.*\); start the server, and run .* again"
    ) as error:
        evaluate(dataclasses.replace(settings, server_timeout=1))
    assert error.value.status == SERVER_FAILURE and kills == [12]
    assert can_resume(settings) and can_resume(dataclasses.replace(settings, batch_size=7))
    served.start()
    assert evaluate(dataclasses.replace(settings, batch_size=3)) == 0  # it waits for the server
    served.kill()

    assert kills == [] and logged == Counter(range(18))
    # What the server was generating when it was killed was asked again, and nothing else.
    assert 18 <= served.requests() <= 18 + 2 + 3
    rows, local = read_rows(tmp_path / "served"), read_rows(tmp_path / "local")
    assert rows == local and len({row["output"] for row in rows}) > 9
    result = json.loads((tmp_path / "served" / "evaluation.json").read_text())
    assert result["model"]["server"] == served.url and result["model"]["name"] == str(model)
    assert "fingerprint" not in result["model"]
    assert f"The model {model} was served by {served.url}." in (tmp_path / "served" / "evaluation.md").read_text()
    assert not (tmp_path / "served" / "generations.partial").exists()


@contextmanager
def scripted_server(replies: list[Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve the replies one after another, the last one for ever: a status, text, JSON, message, or wait in seconds.

    Yield the URL and the list of the received requests.
    """
    requests: list[dict[str, Any]] = []
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({**body, "authorization": self.headers["Authorization"]})
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
            if isinstance(reply, float):
                released.wait(reply)
                return
            status, kind, content = 200, "text/html", reply
            if isinstance(reply, int):
                status, kind, content = reply, "application/json", json.dumps({"error": {"message": "scripted\nmore"}})
            elif isinstance(reply, bytes):
                kind, content = "application/json", reply.decode()
            elif isinstance(reply, dict):
                choice = {"index": 0, "finish_reason": reply.pop("finish_reason", "stop"), "message": reply}
                kind, content = "application/json", json.dumps({"id": "x", "choices": [choice]})
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        released.set()
        server.shutdown()
        thread.join()
        server.server_close()


QUESTION = ServerRequest("pair_id 'p0', en", [{"role": "user", "content": "1 plus 2 is what?"}])


def ask(url: str, requests: dict[int, ServerRequest], **fields: Any) -> dict[int, Generation]:
    generations: dict[int, Generation] = {}
    for finished in generate_by_server(Server(url, "tiny", 9, **fields), requests, 1):
        generations |= finished
    return generations


def test_generate_by_server_repeats_failed_requests(no_delays, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    replies = [503, 429, {"content": "3", "reasoning_content": "1 and 2"}, {"content": None, "finish_reason": "length"}]
    with scripted_server(replies) as (url, requests):
        generations = ask(url, {4: QUESTION, 7: QUESTION}, chat_template_kwargs={"enable_thinking": True})
    assert generations == {4: Generation("3", True, None, "1 and 2"), 7: Generation("", False)}
    assert len(requests) == 4
    expected = {"model": "tiny", "max_tokens": 9, "temperature": 0.0, "authorization": "Bearer secret"}
    expected |= {"messages": QUESTION.messages, "chat_template_kwargs": {"enable_thinking": True}}
    assert requests[0] == requests[3] == expected


def test_generate_by_server_repeats_a_request_whose_answer_is_cut(no_delays):
    choice = b'{"finish_reason": "stop", "message": {"content": "3"}}'
    complete = b'{"choices": [' + choice + b'], "usage": {"completion_tokens": "2"}}'
    with scripted_server([b"", complete[:40], complete]) as (url, requests):
        assert ask(url, {0: QUESTION}) == {0: Generation("3", True)}  # without a number of tokens that is no number
    assert len(requests) == 3


def test_generate_by_server_samples_with_seed(no_delays):
    with scripted_server([{"content": "3", "reasoning": "1 and 2"}]) as (url, requests):
        generations = ask(url, {0: QUESTION._replace(seed=5), 1: QUESTION._replace(seed=6)}, temperature=0.7, top_p=0.9)
    assert generations[1] == Generation("3", True, None, "1 and 2")
    assert [(r["seed"], r["temperature"], r["top_p"]) for r in requests] == [(5, 0.7, 0.9), (6, 0.7, 0.9)]
    assert "chat_template_kwargs" not in requests[0]


def test_generate_by_server_separates_reasoning_that_the_server_leaves_in_the_text(no_delays):
    replies = [{"content": "<think>\n1 and 2\n</think>\n\n3"}, {"content": "<think>\n1 and", "finish_reason": "length"}]
    with scripted_server(replies) as (url, _):
        generations = ask(url, {0: QUESTION, 1: QUESTION})
    assert generations == {0: Generation("3", True, None, "1 and 2"), 1: Generation("", False, None, "1 and")}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (401, r"refuses pair_id 'p0', en: HTTP status 401: scripted; set the environment variable OPENAI_API_KEY$"),
        (404, r"HTTP status 404: scripted; check the name of the model"),
        (400, r"HTTP status 400: scripted$"),
        ("<html>", "the answer is no chat completion; check --base_url"),
        (b'{"choices": []}', "the answer is no chat completion"),
        ({"content": [{"type": "text", "text": "3"}]}, "the answer is no chat completion"),
    ],
)
def test_generate_by_server_reports_refusals(no_delays, reply, message):
    """Responses that arrive before the refusal are yielded."""
    with scripted_server([{"content": "3"}, reply]) as (url, requests):
        responses = generate_by_server(Server(url, "tiny", 9), {0: QUESTION, 1: QUESTION}, 1)
        assert next(responses) == {0: Generation("3", True)}
        with pytest.raises(UserError, match=message) as error:
            list(responses)
    assert error.value.status == 2 and "\n" not in str(error.value) and len(requests) == 2


def test_generate_by_server_does_not_retry_for_ever(no_delays):
    with scripted_server([500]) as (url, requests), pytest.raises(ServerError, match="HTTP status 500"):
        ask(url, {0: QUESTION}, timeout=0.3)
    assert len(requests) == 3  # after delays of 0.1 and 0.2 seconds


def test_evaluate_by_server_stops_on_signal(tmp_path, no_delays):
    """The signal arrives while the server is busy, and the responses so far are kept."""
    data = write_records(tmp_path / "x.jsonl", make_records()[:3])
    settings = EvaluationSettings("tiny", str(data), str(tmp_path / "out"), batch_size=1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    with scripted_server([{"content": "The answer is 3."}, 60.0]) as (url, requests):
        settings = dataclasses.replace(settings, base_url=url)
        stop = StopSignal()
        timer = threading.Timer(1.5, signal.raise_signal, [signal.SIGUSR1])
        timer.start()
        try:
            assert evaluate(settings, stop) == STOPPED_BY_SIGNAL
        finally:
            timer.join()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    assert len(requests) == 2
    log = next((tmp_path / "out" / "generations.partial").glob("rank-0.jsonl")).read_text()
    assert json.loads(log) == [0, "The answer is 3.", True, None, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "localhost:8000/v1"}, "--base_url localhost:8000/v1: not a URL such as"),
        ({"base_url": "http://me:secret@localhost/v1"}, "--base_url: contains credentials"),
        ({"output": None}, "--base_url needs --output"),
        ({"dtype": "float32"}, "--dtype has no effect on a server"),
        ({"chat_template": "x.jinja"}, "--chat_template has no effect on a server"),
        ({"num_samples": 2}, "--num_samples has no effect on greedy decoding"),
        ({"top_p": 0.9}, "--top_p has no effect on greedy decoding"),
        ({"num_shots": 4}, "--num_shots has no effect without --few_shot"),
    ],
)
def test_evaluate_refuses_contradictory_settings(tmp_path, changes, message):
    data = write_records(tmp_path / "x.jsonl", make_records()[:1])
    settings = EvaluationSettings("tiny", str(data), str(tmp_path / "out"), base_url="http://localhost:1/v1")
    with pytest.raises(UserError, match=message) as error:
        evaluate(dataclasses.replace(settings, **changes))
    assert "secret" not in str(error.value) and not (tmp_path / "out").exists()
