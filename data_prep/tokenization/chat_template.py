"""Encode conversations with a tokenizer's chat template as token ids with a mask of the target tokens."""

import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from data_prep.records import message_texts
from data_prep.tokenization.target_spans import TargetLocator
from data_prep.tokenization.template_rendering import ChatTemplate, Message, Span
from data_prep.tokenization.word_encoder import WordEncoder, complement_spans
from pipeline.common.errors import UserError


class ChatEncoder:
    """Encoder for conversations.

    The targets are each response and its end of turn, see `TargetLocator`. If the chat template has `{% generation %}`
    markers, they are only the part of that between the markers. Otherwise the tokens before each response must be the
    same with and without the response.

    Args:
        tokenizer: A tokenizer as `load_tokenizer` returns it.
        supervise: "all" to train on all responses of a conversation, or "last".
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, supervise: str = "all"):
        self._backend = _with_full_offsets(tokenizer.backend_tokenizer)
        # `save_pretrained` keeps the truncation and padding of an earlier call, and `encode` would apply them.
        self._backend.no_truncation()
        self._backend.no_padding()
        special = {str(token) for token in self._backend.get_added_tokens_decoder().values() if token.special}
        special.update(tokenizer.all_special_tokens)
        longest_first = sorted(special, key=len, reverse=True)
        self._special_token = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        template = ChatTemplate(tokenizer)
        self._marked = template.marked
        self._locator = TargetLocator(template, self._special_token, supervise)
        self._word_encoder = WordEncoder.for_backend(self._backend)

    def encode(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[Any] | None = None
    ) -> list[list[int] | UserError]:
        """Encode conversations.

        Args:
            conversations: Messages of each conversation, with `role` and `content`, and optionally `reasoning_content`.
            tools: The tools of each conversation, or None for a conversation without.

        Returns:
            For each conversation a list of T integers: the complement ~t (negative) for a target token with id t, and t
            for any other token. The first token is never a target. A conversation that cannot be encoded gets a
            UserError instead, which does not name the record. This happens if the chat template rejects the messages,
            the targets cannot be located, there is no target token, the text contains a special token, or the prompt
            alone is tokenized differently than within the conversation.
        """
        pairs = zip(conversations, tools or [None] * len(conversations), strict=True)
        return [self._encode(messages, own_tools, check=n == 0) for n, (messages, own_tools) in enumerate(pairs)]

    def prompt_mismatch(self, messages: Sequence[Message], tools: Any = None) -> str:
        """Describe how the text before the last response differs from the generation prompt.

        The description is empty if both are equal, or if the conversation cannot be rendered.
        """
        try:
            return self._locator.prompt_mismatch(messages, tools)
        except UserError:
            return ""

    def _encode(self, messages: Sequence[Message], tools: Any, check: bool) -> list[int] | UserError:
        try:
            for message in messages:
                for text in message_texts(message):
                    if match := self._special_token.search(text):
                        raise UserError(f"the text contains the special token {match[0]}; remove it")
            text, spans = self._locator.locate(messages, tools)
            tokens = self._word_encoder.encode(text, spans) if self._word_encoder else None
            if tokens is None or check:
                encoding = self._backend.encode(text, add_special_tokens=False)
                reference = complement_spans(encoding.ids, _token_spans(encoding, len(text), spans))
                if tokens is not None and tokens != reference:  # compared once per batch
                    raise RuntimeError(f"the word encoder and this tokenizer give different tokens for {text!r}")
                tokens = reference
            if not self._marked:
                self._check_prompts(tokens, text, spans)
            if tokens and tokens[0] < 0:
                tokens[0] = ~tokens[0]
            if not tokens or min(tokens) >= 0:
                raise UserError("no supervised token after the chat template; check the response and the template")
            return tokens
        except UnicodeError:
            return UserError("text that is not valid Unicode (a lone surrogate)")
        except UserError as error:
            return error

    def _check_prompts(self, tokens: list[int], text: str, spans: list[Span]) -> None:
        """Raise UserError unless the text before each response has the same tokens when it is encoded by itself.

        Generation encodes it by itself.
        """
        for start, _ in spans:
            ids = self._backend.encode(text[:start], add_special_tokens=False).ids
            if [t if t >= 0 else ~t for t in tokens[: len(ids)]] != ids:
                raise UserError(
                    "the tokens of the prompt are not a prefix of the conversation's tokens (the chat template or the "
                    "tokenizer merges prompt and response); add {% generation %} markers to the template"
                )


def _with_full_offsets(backend: Tokenizer) -> Tokenizer:
    """Return a tokenizer whose tokens contain all characters of the text.

    The post-processor of some byte-level tokenizers (`trim_offsets`) leaves out the spaces at the start and end of each
    token, so that a token of spaces would belong to no target. It is removed from a copy of the tokenizer.
    """
    post_processor = backend.post_processor
    if post_processor is None or b'"trim_offsets":true' not in post_processor.__getstate__():
        return backend
    copy = Tokenizer.from_str(backend.to_str())
    copy.post_processor = None
    return copy


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
