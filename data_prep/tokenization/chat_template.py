"""From messages to tokens: the chat template's own rendering, tokenized once, with the mask of supervised tokens."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from data_prep.tokenization.word_encoder import Span, WordEncoder, fold
from pipeline.common.errors import UserError

Messages = list[dict[str, str]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLAIN = {"role", "content"}


class ChatEncoder:
    """Encodes conversations in batches.

    Where the chat template has `{% generation %}` markers they decide what is supervised. Elsewhere every assistant
    turn is what follows its generation prompt, and the tokens of that prompt must be a prefix of the whole's tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._backend = tokenizer.backend_tokenizer
        self._template = tokenizer.get_chat_template()
        self._compiled = _compile_jinja_template(self._template)
        self._special = tokenizer.special_tokens_map
        self._marked = bool(_GENERATION.search(self._template))
        self._control = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)) or "(?!)")
        self._words = WordEncoder.of(self._backend)

    def encode(self, conversations: Sequence[Messages]) -> list[list[int] | UserError]:
        """Tokens [T] per conversation: token id t where not supervised, ~t (negative) where supervised.

        The first token is never supervised. In place of a list stands a UserError, without the record's name, where
        the template refuses the messages, nothing is supervised, or prompt and whole tokenize differently.
        """
        return [self._encode(messages, check=number == 0) for number, messages in enumerate(conversations)]

    def _encode(self, messages: Messages, check: bool) -> list[int] | UserError:
        try:
            for message in messages:
                if found := self._control.search(message["content"]):
                    raise UserError(f"the text holds the control token {found[0]}; remove it")
            whole, spans = self._render(messages)
            tokens = self._words.encode(whole, spans) if self._words else None
            if tokens is None or check:
                encoding = self._backend.encode(whole, add_special_tokens=False)
                slow = fold(encoding.ids, _token_spans(encoding, len(whole), spans))
                if tokens is not None and tokens != slow:  # one in a batch is compared, whatever the rules say
                    raise RuntimeError(f"word by word this tokenizer gives other tokens than whole for {whole!r}")
                tokens = slow
            if not self._marked:
                self._check_prompts(tokens, whole, messages)
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
        """The conversation as text, and the character spans that are supervised."""
        whole, spans = self._text(messages)
        if not self._marked:
            for turn, message in enumerate(messages):
                if message["role"] == "assistant":
                    start = len(self._text(messages[:turn], prompt=True)[0])
                    spans.append((start, len(self._text(messages[: turn + 1])[0].rstrip())))
        return whole, [(start, end) for start, end in spans if start < end]

    def _text(self, messages: Messages, prompt: bool = False) -> tuple[str, list[Span]]:
        """The rendered text and its generation spans. Raises UserError where the template refuses the messages."""
        try:
            if any(message.keys() != _PLAIN for message in messages):
                render: Callable[..., Any] = render_jinja_template  # knows the many names of reasoning and tools
                texts, spans = render(
                    [messages],
                    chat_template=self._template,
                    add_generation_prompt=prompt,
                    return_assistant_tokens_mask=self._marked,
                    **self._special,
                )
                return texts[0], spans[0] if self._marked else []
            blocks: list[str] = []
            found: list[Span] = []
            with self._compiled.environment.activate_tracker(blocks, found):  # as render_jinja_template does within
                known = {"tools": None, "documents": None, "add_generation_prompt": prompt, **self._special}
                blocks.extend(self._compiled.generate(messages=messages, **known))
            return "".join(blocks), found
        except Exception as error:  # templates raise jinja2 errors, TypeError, what not: it is their program
            raise UserError(f"the chat template refuses the messages: {error}") from None

    def _check_prompts(self, tokens: list[int], whole: str, messages: Messages) -> None:
        """What the model is given to answer must be tokenized as in training, or it learns from a prompt never seen."""
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._text(messages[:turn], prompt=True)[0]
            ids = self._backend.encode(prompt, add_special_tokens=False).ids
            if not whole.startswith(prompt) or [t if t >= 0 else ~t for t in tokens[: len(ids)]] != ids:
                raise UserError(
                    "the prompt's tokens are no prefix of the conversation's (the chat template or the tokenizer joins "
                    "prompt and response); give the template {% generation %} markers"
                )


def _token_spans(encoding: Encoding, characters: int, spans: list[Span]) -> list[Span]:
    """Spans of characters as spans of tokens; a token that holds a span's first or last character belongs to it."""
    found = []
    for start, end in spans:
        first, after = _token_at(encoding, start, end), _token_at(encoding, end, characters)
        if first is None:
            continue
        last = len(encoding.ids) if after is None else after
        if after is not None and encoding.char_to_token(end - 1) == after:
            last += 1  # one token holds the end of the span and what follows
        found.append((first, last))
    return found


def _token_at(encoding: Encoding, start: int, end: int) -> int | None:
    """The first token that holds a character of [start, end)."""
    for place in range(start, end):
        token = encoding.char_to_token(place)
        if token is not None:
            return token
    return None
