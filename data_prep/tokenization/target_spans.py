"""Locate the target text of a conversation in its rendering.

A chat template may trim a response, drop its reasoning from earlier turns, insert an empty think block, or render a
prefix of a conversation differently from the whole. The spans are therefore found in the rendering of the whole
conversation. It is rendered a second time with placeholders instead of the message texts, which shows the text that the
template itself writes. The spans are valid only if that text and the message texts together give the first rendering.

The target of a response is its text (and its reasoning, if the template keeps it) with the end of turn. White space
between generation prompt and response is a target too, because the model must generate it.
"""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from data_prep.tokenization.template_rendering import ChatTemplate, Message, Span
from pipeline.common.errors import UserError

CACHED_LAYOUTS = 4096

_PLACEHOLDER = re.compile(r"qxplaceholder(\d{6})x")
_THINK_START = re.compile(r"\s*(?:<think>)?")
_THINK_END = "</think>"


class _ReasoningDroppedError(UserError):
    """The chat template does not render the reasoning of the last response."""


class _Masked(NamedTuple):
    """A conversation with placeholders.

    Attributes:
        messages: The messages. The text of a message is replaced without the white space around it.
        texts: The replaced texts by placeholder number.
        numbers: Placeholder numbers of the reasoning and of the text of each message, or None.
    """

    messages: list[dict[str, Any]]
    texts: list[str]
    numbers: list[tuple[int | None, int | None]]


class _Target(NamedTuple):
    """A target in a layout.

    Attributes:
        first, last: Indices of its first and last placeholder in `_Layout.parts`.
        before: Number of characters before `first` that belong to it.
        after: Number of characters after `last` that belong to it.
    """

    first: int
    last: int
    before: int
    after: int


class _Layout(NamedTuple):
    """Rendering of a conversation with placeholders.

    Attributes:
        parts: Text that the template writes, at even indices, and placeholder numbers, at odd indices.
        targets: The targets in their order.
        mismatch: How the last response's prompt differs from the generation prompt, or an empty string.
    """

    parts: list[Any]
    targets: list[_Target]
    mismatch: str


class TargetLocator:
    """Finds the target spans of conversations.

    Args:
        template: The chat template.
        special_token: Matches the tokenizer's special tokens; the first one after a response ends the turn.
        supervise: "all" to train on all responses of a conversation, or "last" for the last one only.
    """

    def __init__(self, template: ChatTemplate, special_token: re.Pattern[str], supervise: str = "all"):
        self._template, self._special_token, self._supervise = template, special_token, supervise
        self._layouts: dict[str, _Layout | UserError] = {}

    def locate(self, messages: Sequence[Message], tools: Any = None) -> tuple[str, list[Span]]:
        """Return the rendered text of a conversation and the character spans of its targets.

        Raises UserError if the template rejects the messages, or if a target cannot be located for certain.
        """
        return self._locate(messages, tools)[:2]

    def prompt_mismatch(self, messages: Sequence[Message], tools: Any = None) -> str:
        """Describe how the text before the last response differs from the generation prompt.

        The description is empty if both are equal.
        """
        return self._locate(messages, tools)[2]

    def _locate(self, messages: Sequence[Message], tools: Any) -> tuple[str, list[Span], str]:
        text, generated = self._template.render(messages, tools)
        error = UserError("the chat template changes the text of a message, so that the response cannot be located")
        # Placeholders for all messages are tried first, because their layouts can be cached. A template that examines
        # the text of a system or user message needs the real text there.
        for roles in (None, ("assistant",)):
            masked = _mask(messages, roles)
            try:
                layout = self._cached_layout(masked, tools) if roles is None else self._layout(masked, tools)
            except _ReasoningDroppedError:
                if any("reasoning_content" in message for message in messages):
                    return self._locate([_move_reasoning(message) for message in messages], tools)
                raise
            except UserError as failure:
                error = failure
                continue
            spans = _match(layout, masked.texts, text)
            if spans is not None:
                if self._template.marked:
                    spans = [(max(a, c), min(b, d)) for a, b in spans for c, d in generated]
                return text, [(start, end) for start, end in spans if start < end], layout.mismatch
        raise error

    def _cached_layout(self, masked: _Masked, tools: Any) -> _Layout:
        key = repr((masked.messages, tools))
        layout = self._layouts.get(key)
        if layout is None:
            try:
                layout = self._layout(masked, tools)
            except UserError as error:
                layout = error
            if len(self._layouts) < CACHED_LAYOUTS:
                self._layouts[key] = layout
        if isinstance(layout, UserError):
            raise type(layout)(str(layout))
        return layout

    def _layout(self, masked: _Masked, tools: Any) -> _Layout:
        parts = self._split(masked.messages, tools)
        turns = [turn for turn, message in enumerate(masked.messages) if message["role"] == "assistant"]
        if not turns:
            return _Layout(parts, [], "")
        if masked.numbers[turns[-1]][1] is None:
            raise UserError("empty response: the last message has no text after its reasoning")
        if parts[-2:-1] != [masked.numbers[turns[-1]][1]]:
            raise UserError("the chat template changes or moves the last response, so that it cannot be located")
        end_of_turn = self._end_of_turn(parts[-1])
        targets, mismatch = [], ""
        for turn in turns if self._supervise == "all" else turns[-1:]:
            if masked.messages[turn].get("tool_calls"):
                advice = "remove the record" if turn == turns[-1] else "pack with --supervise last"
                raise UserError(f"tool calls cannot be trained on; {advice}")
            reasoning, answer = masked.numbers[turn]
            if answer is None:
                continue
            if parts[1::2].count(answer) != 1:
                raise UserError(f"the chat template leaves out or repeats the response in message {turn + 1}")
            last = parts.index(answer, 1)
            first = last - 2 if reasoning is not None and parts[last - 2 : last - 1] == [reasoning] else last
            if turn == turns[-1] and reasoning is not None and first == last:
                raise _ReasoningDroppedError(
                    "the chat template leaves out the reasoning of the last response; "
                    "give a template that keeps it with --chat_template"
                )
            written = parts[last + 1].lstrip()
            if not written.startswith(end_of_turn):
                raise UserError(
                    f"the chat template ends the response in message {turn + 1} differently from the last response; "
                    "pack with --supervise last"
                )
            before, mismatch = self._prompt_end(masked.messages[:turn], tools, parts, first, first != last)
            after = (
                len(parts[last + 1]) - len(written) + len(end_of_turn)
            )  # includes white space at the end of the text
            targets.append(_Target(first, last, before, after))
        return _Layout(parts, targets, mismatch)

    def _split(self, messages: Sequence[Message], tools: Any, prompt: bool = False) -> list[Any]:
        """Render a conversation with placeholders. Return its parts as in `_Layout`."""
        parts: list[Any] = _PLACEHOLDER.split(self._template.render(messages, tools, prompt)[0])
        parts[1::2] = map(int, parts[1::2])
        return parts

    def _end_of_turn(self, text: str) -> str:
        """Return the end of turn, given the text after the last response."""
        match = self._special_token.search(text)
        end_of_turn = (text[: match.end()] if match else text).strip()
        if not end_of_turn:
            raise UserError("the chat template writes no end of turn after a response, so the model would never stop")
        return end_of_turn

    def _prompt_end(
        self, history: Sequence[Message], tools: Any, parts: list[Any], first: int, has_reasoning: bool
    ) -> tuple[int, str]:
        """Compare the text before a response with the generation prompt.

        Returns:
            The number of characters between prompt and response that are targets, and a description of the difference.
        """
        written = parts[first - 1]
        try:
            prompt_parts = self._split(history, tools, prompt=True)
        except UserError:  # some templates reject an empty history
            prompt_parts = [""]
        previous = parts[first - 2] if first > 1 else None
        if (prompt_parts[-2] if len(prompt_parts) > 1 else None) != previous:
            prompt_parts = [""]
        prompt = prompt_parts[-1]
        common = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(prompt, written, strict=False))))
        rest = written[common:]
        is_target = bool(common) and (has_reasoning or not rest.strip())
        if has_reasoning and rest.strip() and (not common or common < len(prompt)):
            raise UserError("the start of the reasoning cannot be told from the prompt; pack with --supervise last")
        mismatch = ""
        if common < len(prompt) or (rest.strip() and not is_target):
            tokens = list(self._special_token.finditer(prompt[:common]))
            start = tokens[-1].start() if tokens else 0  # of the part of both that is printed
            ends = [repr(text[start:][-60:]) for text in (prompt, written)]
            mismatch = f"a prompt for generation ends in {ends[0]}, but in the data the response follows {ends[1]}"
        return len(rest) if is_target else 0, mismatch


def _mask(messages: Sequence[Message], roles: Sequence[str] | None) -> _Masked:
    """Replace the texts of the messages of some roles (None for all) by placeholders."""
    texts: list[str] = []

    def replace(text: str) -> str:
        core = text.strip()
        if not core:
            return text
        start = text.index(core)
        texts.append(core)
        return f"{text[:start]}qxplaceholder{len(texts) - 1:06d}x{text[start + len(core) :]}"

    def number(before: int) -> int | None:
        return before if len(texts) > before else None

    masked: list[dict[str, Any]] = []
    numbers: list[tuple[int | None, int | None]] = []
    for message in messages:
        if roles is not None and message["role"] not in roles:
            masked.append(dict(message))
            numbers.append((None, None))
            continue
        changed, reasoning, content = dict(message), None, message["content"]
        head = ""
        if "reasoning_content" in message:
            before = len(texts)
            changed["reasoning_content"] = replace(message["reasoning_content"])
            reasoning = number(before)
        elif message["role"] == "assistant" and _THINK_END in content:
            thoughts, _, content = content.partition(_THINK_END)
            opening = _THINK_START.match(thoughts)
            start = opening.end() if opening else 0
            before = len(texts)
            head = thoughts[:start] + replace(thoughts[start:]) + _THINK_END
            reasoning = number(before)
        before = len(texts)
        changed["content"] = head + replace(content)
        masked.append(changed)
        numbers.append((reasoning, number(before)))
    return _Masked(masked, texts, numbers)


def _move_reasoning(message: Message) -> dict[str, Any]:
    """Return a message with its reasoning in think tags, for templates that do not read the field."""
    moved = dict(message)
    reasoning = moved.pop("reasoning_content", "")
    if reasoning.strip():
        moved["content"] = f"<think>\n{reasoning.strip()}\n{_THINK_END}\n\n{message['content']}"
    return moved


def _match(layout: _Layout, texts: list[str], text: str) -> list[Span] | None:
    """Return the spans of a layout's targets in a text, or None if the text does not have this layout."""
    starts, position = [], 0
    for part in layout.parts:
        if isinstance(part, int) and part >= len(texts):  # a role or a tool looks like a placeholder
            return None
        expected = texts[part] if isinstance(part, int) else part
        if not text.startswith(expected, position):
            return None
        starts.append(position)
        position += len(expected)
    if position != len(text):
        return None
    return [(starts[t.first] - t.before, starts[t.last + 1] + t.after) for t in layout.targets]
