"""Generate responses with an OpenAI-compatible server, such as vLLM, SGLang, llama.cpp or `transformers serve`.

Each response is one request. The requests run concurrently in an event loop. A request is repeated until it is
answered, so that a server can be restarted in the meantime.
"""

import asyncio
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import islice
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tqdm import tqdm

from pipeline.common import distributed
from pipeline.common.errors import ServerError, UserError
from pipeline.common.optional_imports import import_optional
from pipeline.evaluation.progress import Generation
from pipeline.evaluation.reasoning import split_reasoning

API_KEY = "OPENAI_API_KEY"  # environment variable
POLL_SECONDS = 1.0  # interval between the checks for a signal while no response arrives
CONNECT_SECONDS = 10.0
FIRST_DELAY, LONGEST_DELAY = 0.5, 15.0  # seconds between two attempts of a request
RETRIED = (408, 409, 425, 429)  # HTTP statuses that a later attempt may not get, besides those of 500 and above
# A response may take hours, so there is no read timeout. Probes detect a machine that has disappeared within minutes.
KEEPALIVE = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 30, "TCP_KEEPCNT": 4}


class ServerRequest(NamedTuple):
    """A request for one response.

    Attributes:
        label: the record, for error messages.
        messages: the conversation before the response.
        seed: random seed of the response, or None for greedy decoding.
    """

    label: str
    messages: Sequence[Mapping[str, Any]]
    seed: int | None = None


class Server(NamedTuple):
    """A server, and what all requests have in common.

    Attributes:
        base_url: URL of the API, which usually ends in /v1.
        model: name of the served model.
        max_new_tokens: maximum length of a response, in tokens.
        temperature: 0 for greedy decoding.
        top_p: probability mass of nucleus sampling.
        chat_template_kwargs: variables of the chat template.
        timeout: seconds of waiting, without an answer to any request, after which a request is given up.
    """

    base_url: str
    model: str
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    chat_template_kwargs: Mapping[str, Any] = {}
    timeout: float = 600.0


def check_base_url(url: str) -> None:
    """Check the URL of a server.

    Raises:
        UserError: it is not an HTTP URL, or contains credentials, which the result files would show.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"--base_url {url}: not a URL such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise UserError(f"--base_url: contains credentials or a query; give an API key in the variable {API_KEY}")


def generate_by_server(
    server: Server, requests: Mapping[int, ServerRequest], concurrency: int
) -> Iterator[dict[int, Generation]]:
    """Send requests, at most `concurrency` at a time. Yield the responses as they arrive, by the keys of `requests`.

    While no response arrives, yield an empty dictionary every second. Closing the iterator cancels the requests in
    progress.

    Raises:
        UserError: the server refuses a request, or openai is not installed.
        ServerError: the server has not answered for `server.timeout` seconds.
    """
    quiet = not distributed.is_main_process()
    with (
        asyncio.Runner() as runner,
        tqdm(total=len(requests), desc="evaluate", unit="record", disable=quiet) as progress,
    ):
        client = _Client(server)
        waiting, tasks = iter(requests.items()), dict[asyncio.Task[Generation], int]()
        try:
            while True:
                for index, request in islice(waiting, concurrency - len(tasks)):
                    tasks[runner.get_loop().create_task(client.ask(request))] = index
                if not tasks:
                    return
                wait = asyncio.wait(tasks, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                finished = {task: tasks.pop(task) for task in runner.run(wait)[0]}
                generations = {index: task.result() for task, index in finished.items() if not task.exception()}
                progress.update(len(generations))
                yield generations
                for task in finished:
                    task.result()  # raises the error of a failed request, after the others have been logged
        finally:
            for task in tasks:
                task.cancel()
            runner.run(client.close())


class _Client:
    """Sends requests, and repeats those that fail while the server is down."""

    def __init__(self, server: Server) -> None:
        openai: Any = import_optional("openai")
        httpx: Any = import_module(openai.DefaultAsyncHttpxClient.__base__.__module__)  # httpx2, or earlier httpx
        self._openai, self._server, self._answers, self._noted = openai, server, 0, False
        levels = {"SO_KEEPALIVE": socket.SOL_SOCKET}
        options = [
            (levels.get(name, socket.IPPROTO_TCP), getattr(socket, name), value)
            for name, value in KEEPALIVE.items()
            if hasattr(socket, name)
        ]
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = openai.AsyncOpenAI(
            base_url=server.base_url,
            api_key=os.environ.get(API_KEY) or "none",
            max_retries=0,
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            http_client=openai.DefaultAsyncHttpxClient(
                transport=httpx.AsyncHTTPTransport(limits=limits, socket_options=options), timeout=None
            ),
        )

    async def ask(self, request: ServerRequest) -> Generation:
        """Return the response. Repeat the request with growing delays until it is answered.

        Raises:
            UserError: the server refuses the request.
            ServerError: the delays add up to `Server.timeout`, and no other request was answered in the meantime.
        """
        delay, waited, answers = FIRST_DELAY, 0.0, self._answers
        while True:
            try:
                generation = await self._attempt(request)
                self._answers += 1
                return generation
            except self._openai.APIConnectionError as error:
                reason = str(error.__cause__ or error).partition("\n")[0] or type(error.__cause__).__name__
            except self._openai.APIStatusError as error:
                reason = f"HTTP status {error.status_code}: {_detail(error)}"
                if error.status_code < 500 and error.status_code not in RETRIED:
                    hint = _hint(error.status_code)
                    raise UserError(f"{self._server.base_url} refuses {request.label}: {reason}{hint}") from None
            except json.JSONDecodeError:  # the server or a gateway was stopped while it answered
                reason = "the answer is not JSON"
            if answers != self._answers:
                waited, answers, delay = 0.0, self._answers, FIRST_DELAY
            if waited >= self._server.timeout:
                raise ServerError(
                    f"{self._server.base_url}: no answer for {self._server.timeout:g} seconds ({reason}); start the "
                    "server, and run the same command again to resume"
                )
            self._note(reason)
            await asyncio.sleep(delay)
            waited, delay = waited + delay, min(2 * delay, LONGEST_DELAY)

    def _note(self, reason: str) -> None:
        """Print the first failure."""
        if not self._noted and distributed.is_main_process():
            self._noted = True
            tqdm.write(f"{self._server.base_url}: {reason}; requests are repeated until the server answers")

    async def _attempt(self, request: ServerRequest) -> Generation:
        server, sampling = self._server, dict[str, Any]()
        if request.seed is not None:
            sampling = {"seed": request.seed, "top_p": server.top_p}
        extra = {"chat_template_kwargs": dict(server.chat_template_kwargs)} if server.chat_template_kwargs else None
        completion = await self._client.chat.completions.create(
            model=server.model,
            messages=list(request.messages),
            max_tokens=server.max_new_tokens,
            temperature=server.temperature,
            extra_body=extra,
            **sampling,
        )
        try:
            return _read_completion(completion)
        except (AttributeError, IndexError, TypeError):  # the library does not check the form of an answer
            raise UserError(
                f"{server.base_url}: the answer is no chat completion; check --base_url, which usually ends in /v1"
            ) from None

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()


def _read_completion(completion: Any) -> Generation:
    """Return the response in the answer of a server.

    Raises:
        AttributeError, IndexError, TypeError: it does not have the form of a chat completion.
    """
    choice = completion.choices[0]
    text, more = choice.message.content or "", choice.message.model_extra or {}
    reasoning = more.get("reasoning_content") or more.get("reasoning") or None  # vLLM has renamed it
    if not isinstance(text, str) or not isinstance(reasoning, str | None):
        raise TypeError
    if not reasoning:  # the server has no parser of reasoning
        text, reasoning = split_reasoning(text)
    tokens = completion.usage.completion_tokens if completion.usage else None
    return Generation(text, choice.finish_reason == "stop", tokens if isinstance(tokens, int) else None, reasoning)


def _detail(error: Any) -> str:
    """Return the first line of the server's explanation of an error status."""
    body = error.body if isinstance(error.body, dict) else {}
    text = str(body.get("message") or body.get("detail") or error.message)
    return text.strip().partition("\n")[0][:300]


def _hint(status: int) -> str:
    """Return what to do about the most frequent refusals."""
    if status in (401, 403):
        return f"; set the environment variable {API_KEY}"
    if status == 404:
        return "; check the name of the model (--model), and the end of --base_url, usually /v1"
    return ""
