"""Encode conversations with a tokenizer's chat template as token ids with a mask of the target tokens."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from data_prep.tokenization.word_encoder import Span, WordEncoder, complement_spans
from pipeline.common.errors import UserError

Messages = list[dict[str, str]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLAIN = {"role", "content"}


class ChatEncoder:
    """Encoder for conversations.

    If the chat template has `{% generation %}` markers, the text between them is the target. Otherwise the target is
    the text of each assistant message after its generation prompt. In that case the tokens of the prompt must be a
    prefix of the tokens of the conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._backend = tokenizer.backend_tokenizer
        self._template = tokenizer.get_chat_template()
        self._compiled = _compile_jinja_template(self._template)
        self._special = tokenizer.special_tokens_map
        self._marked = bool(_GENERATION.search(self._template))
        self._control = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)) or "(?!)")
        self._word_encoder = WordEncoder.for_backend(self._backend)

    def encode(self, conversations: Sequence[Messages]) -> list[list[int] | UserError]:
        """Encode conversations.

        Args:
            conversations: Messages of each conversation, with `role` and `content`.

        Returns:
            For each conversation a list of T integers: the complement ~t (negative) for a target token with id t, and t
            for any other token. The first token is never a target. A conversation that cannot be encoded gets a
            UserError instead, which does not name the record. This happens if the chat template rejects the messages,
            there is no target token, the text contains a control token, or the prompt alone is tokenized differently
            than within the conversation.
        """
        return [self._encode(messages, check=number == 0) for number, messages in enumerate(conversations)]

    def _encode(self, messages: Messages, check: bool) -> list[int] | UserError:
        try:
            for message in messages:
                if match := self._control.search(message["content"]):
                    raise UserError(f"the text contains the control token {match[0]}; remove it")
            text, spans = self._render(messages)
            tokens = self._word_encoder.encode(text, spans) if self._word_encoder else None
            if tokens is None or check:
                encoding = self._backend.encode(text, add_special_tokens=False)
                reference = complement_spans(encoding.ids, _token_spans(encoding, len(text), spans))
                if tokens is not None and tokens != reference:  # compared once per batch
                    raise RuntimeError(f"the word encoder and this tokenizer give different tokens for {text!r}")
                tokens = reference
            if not self._marked:
                self._check_prompts(tokens, text, messages)
            if tokens and tokens[0] < 0:
                tokens[0] = ~tokens[0]
            if not tokens or min(tokens) >= 0:
                raise UserError("no supervised token after the chat template; check the response and the template")
            return tokens
        except UnicodeError:
            return UserError("text that is not valid Unicode (a lone surrogate)")
        except UserError as error:
            return error

    def _render(self, messages: Messages) -> tuple[str, list[Span]]:
        """Return the text of a conversation and the character spans of the target text."""
        text, spans = self._apply_template(messages)
        if not self._marked:
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":
                    start = len(self._apply_template(messages[:turn], prompt=True)[0])
                    spans.append((start, len(self._apply_template(messages[: turn + 1])[0].rstrip())))
        return text, [(start, end) for start, end in spans if start < end]

    def _apply_template(self, messages: Messages, prompt: bool = False) -> tuple[str, list[Span]]:
        """Return the rendered text and its generation spans. Raises UserError if the template rejects the messages.

        Messages that have only a role and content (nearly all) are rendered without the overhead of transformers.
        """
        try:
            if any(message.keys() != _PLAIN for message in messages):
                render: Callable[..., Any] = render_jinja_template
                texts, spans = render(
                    [messages],
                    chat_template=self._template,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=self._marked,
                    **self._special,
                )
                return texts[0], spans[0] if self._marked else []
            blocks: list[str] = []
            generated: list[Span] = []
            with self._compiled.environment.activate_tracker(blocks, generated):  # as render_jinja_template does
                variables = {"tools": None, "documents": None, "add_generation_prompt": prompt, **self._special}
                blocks.extend(self._compiled.generate(messages=messages, **variables))
            return "".join(blocks), generated
        except Exception as error:  # a template can raise any type of exception
            raise UserError(f"the chat template rejects the messages: {error}") from None

    def _check_prompts(self, tokens: list[int], text: str, messages: Messages) -> None:
        """Check that each prompt has the same tokens alone, as in evaluation, as within the conversation."""
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._apply_template(messages[:turn], prompt=True)[0]
            ids = self._backend.encode(prompt, add_special_tokens=False).ids
            if not text.startswith(prompt) or [t if t >= 0 else ~t for t in tokens[: len(ids)]] != ids:
                raise UserError(
                    "the tokens of the prompt are not a prefix of the conversation's tokens (the chat template or the "
                    "tokenizer merges prompt and response); add {% generation %} markers to the template"
                )


def _token_spans(encoding: Encoding, characters: int, spans: list[Span]) -> list[Span]:
    """Convert character spans to token spans, which include the tokens of the first and the last character."""
    token_spans = []
    for start, end in spans:
        first, after = _token_at(encoding, start, end), _token_at(encoding, end, characters)
        if first is None:
            continue
        last = len(encoding.ids) if after is None else after
        if after is not None and encoding.char_to_token(end - 1) == after:
            last += 1  # this token contains the end of the span and the text after it
        token_spans.append((first, last))
    return token_spans


def _token_at(encoding: Encoding, start: int, end: int) -> int | None:
    """Return the first token that contains a character of [start, end), or None."""
    for position in range(start, end):
        token = encoding.char_to_token(position)
        if token is not None:
            return token
    return None
