"""From messages to tokens: the chat template's own rendering, tokenized once, with the mask of supervised tokens."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from data_prep.errors import UserError

Messages = list[dict[str, str]]
Span = tuple[int, int]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatEncoder:
    """Encodes conversations in batches.

    Where the chat template has `{% generation %}` markers they decide what is supervised. Elsewhere every assistant
    turn is what follows its generation prompt, and the tokens of that prompt must be a prefix of the whole's tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._backend = tokenizer.backend_tokenizer
        self._template = tokenizer.get_chat_template()
        render: Callable[..., Any] = render_jinja_template  # its own annotations are wrong about what it returns
        self._rendering = partial(render, chat_template=self._template, **tokenizer.special_tokens_map)
        self._marked = bool(_GENERATION.search(self._template))

    def encode(self, conversations: Sequence[Messages]) -> list[np.ndarray | UserError]:
        """One int32 array [T] per conversation: token id t where not supervised, ~t (negative) where supervised.

        The first token is never supervised. In place of an array stands a UserError, without the record's name, where
        the template refuses the messages, nothing is supervised, or prompt and whole tokenize differently.
        """
        rendered = [self._render(messages) for messages in conversations]
        texts = [whole for whole, _ in rendered if not isinstance(whole, UserError)]
        try:
            encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        except (TypeError, UnicodeError):  # a lone surrogate somewhere: find whose it is
            if len(conversations) > 1:
                return [self.encode([messages])[0] for messages in conversations]
            return [UserError("text that is not valid Unicode (a lone surrogate)")]
        result: list[np.ndarray | UserError] = []
        for messages, (whole, spans) in zip(conversations, rendered, strict=True):
            if isinstance(whole, UserError):
                result.append(whole)
                continue
            try:
                result.append(self._supervise(next(encodings), len(whole), spans, messages))
            except UserError as error:
                result.append(error)
        return result

    def _render(self, messages: Messages) -> tuple[str | UserError, list[Span]]:
        """The conversation as text, and the character spans that are supervised."""
        try:
            if self._marked:
                rendered, spans = self._rendering([messages], return_assistant_tokens_mask=True)
                return rendered[0], spans[0]
            whole = self._text(messages)
            spans = []
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":
                    start, end = (
                        len(self._text(messages[:turn], prompt=True)),
                        len(self._text(messages[: turn + 1]).rstrip()),
                    )
                    spans.append((start, end))
            return whole, spans
        except Exception as error:  # templates raise jinja2 errors, TypeError, what not: it is their program
            return UserError(f"the chat template refuses the messages: {error}"), []

    def _text(self, messages: Messages, prompt: bool = False) -> str:
        return self._rendering([messages], add_generation_prompt=prompt)[0][0]

    def _supervise(self, encoding, characters: int, spans: list[Span], messages: Messages) -> np.ndarray:
        tokens = np.array(encoding.ids, np.int32)
        if not self._marked:
            self._check_prompts(tokens, messages)
        for start, end in spans:
            first = _token_at(encoding, start, end)
            if first is None:
                continue
            after = _token_at(encoding, end, characters)
            last = len(tokens) if after is None else after
            if after is not None and encoding.char_to_token(end - 1) == after:
                last += 1  # one token holds the end of the span and what follows: it is the span's
            first = max(first, 1)
            tokens[first:last] = np.where(tokens[first:last] < 0, tokens[first:last], ~tokens[first:last])
        if not (tokens < 0).any():
            raise UserError("no supervised token after the chat template; check the response and the template")
        return tokens

    def _check_prompts(self, tokens: np.ndarray, messages: Messages) -> None:
        """What the model is given to answer must be tokenized as in training, or it learns from a prompt never seen."""
        whole = self._text(messages)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._text(messages[:turn], prompt=True)
            ids = self._backend.encode(prompt, add_special_tokens=False).ids
            if not whole.startswith(prompt) or tokens[: len(ids)].tolist() != ids:
                raise UserError(
                    "the prompt's tokens are no prefix of the conversation's (the chat template or the tokenizer joins "
                    "prompt and response); give the template {% generation %} markers"
                )


def _token_at(encoding, start: int, end: int) -> int | None:
    """The first token that holds a character of [start, end)."""
    for place in range(start, end):
        token = encoding.char_to_token(place)
        if token is not None:
            return token
    return None
