"""Render conversations with a chat template whose variables and clock have fixed values."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2.meta import find_undeclared_variables
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from pipeline.common.errors import UserError, first_line

Message = dict[str, Any]
Span = tuple[int, int]

# Templates that read the clock get this date, so that the same input gives the same shards on every day. It is the
# default date of Llama 3's templates.
CLOCK = datetime(2024, 7, 26)

_CLOCK_CALL = re.compile(r"""\bstrftime_now\s*\(\s*("[^"\\]*"|'[^'\\]*')\s*\)""")
_ANY_CLOCK_CALL = re.compile(r"\bstrftime_now\s*\(")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "strftime_now"}
_SPECIAL_TOKEN = re.compile("(?:bos|eos|unk|sep|pad|cls|mask|additional_special)_tokens?")  # set by the tokenizer


def reads_clock(template: str) -> bool:
    """Return whether a chat template calls `strftime_now`, the clock that transformers passes to templates."""
    return bool(_ANY_CLOCK_CALL.search(template))


def fix_clock(template: str) -> str:
    """Replace every clock call of a chat template by the date `CLOCK` in the format of the call.

    Raises UserError if a call computes its format.
    """
    fixed = _CLOCK_CALL.sub(lambda match: f'"{CLOCK.strftime(match[1][1:-1])}"', template)
    if reads_clock(fixed):
        raise UserError("the chat template reads the clock in a format that it computes; write a date into it")
    return fixed


def set_variables(template: str, variables: Mapping[str, Any]) -> str:
    """Return a chat template in which `variables` have default values, which the caller of the template can override.

    The values become part of the template's text, so that they follow the tokenizer to every stage and to other
    libraries. Setting the same variables twice changes nothing.

    Raises:
        UserError: A name cannot be a variable of a chat template.
    """
    for name in variables:
        if not name.isidentifier() or name in _RESERVED or _SPECIAL_TOKEN.fullmatch(name):
            raise UserError(f"{name!r} is not a variable of chat templates that can be set")
    preamble = _preamble(variables)
    return template if template.startswith(preamble) else preamble + template


def _preamble(variables: Mapping[str, Any]) -> str:
    """Return the text that sets the variables before a chat template."""
    preamble = "".join(f"{{%- set {name} = {name} | default({value!r}) %}}" for name, value in variables.items())
    # The empty expression protects a line break at the start of the template, which Jinja would remove after a block.
    return preamble + "{{ '' }}" if preamble else ""


def check_variables(template: str, variables: Mapping[str, Any]) -> None:
    """Check that a chat template reads these variables. It would ignore a misspelled one without a message.

    The template may have been returned by `set_variables` for them.

    Raises:
        UserError: the chat template has no such variable, or it is set by the records.
    """
    if not variables:
        return
    if "tools" in variables:
        raise UserError("--chat_template_kwargs: give `tools` in the records, whose field it is")
    own = {"messages", "add_generation_prompt", "tools"}  # those that are not for the user to set
    known = template_variables(template.removeprefix(_preamble(variables))) - own
    if unknown := sorted(variables.keys() - known):
        raise UserError(
            f"--chat_template_kwargs: the chat template has no variable {unknown[0]!r}; "
            f"its variables are: {', '.join(sorted(known)) or 'none'}"
        )


def template_variables(template: str) -> set[str]:
    """Return the names that a chat template reads without defining them.

    Raises:
        TemplateError: the template is not valid Jinja.
    """
    return find_undeclared_variables(_compile_jinja_template(template).environment.parse(template))


def _with_thinking(message: Message) -> Message:
    """Return a message with its reasoning also under the name that gpt-oss reads, as transformers passes it."""
    return {"thinking": message["reasoning_content"], **message} if "reasoning_content" in message else message


class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        marked: Whether the template has `{% generation %}` markers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        template = tokenizer.get_chat_template()
        self.marked = bool(_GENERATION.search(template))
        self._compiled = _compile_jinja_template(template)
        # transformers uses another template if there are tools, so that generation would differ from the packed text.
        self._without_tools = tokenizer.get_chat_template(tools=[]) != template
        # The template's globals are a ChainMap, which Jinja would copy, slowly, for every conversation.
        self._variables = {**self._compiled.globals, "documents": None, **tokenizer.special_tokens_map}

    def render(self, messages: Sequence[Message], tools: Any = None, prompt: bool = False) -> tuple[str, list[Span]]:
        """Render a conversation, like `apply_chat_template` but without its overhead.

        Args:
            messages: The messages.
            tools: JSON schemas of the tools that the assistant may call, or None.
            prompt: Whether to append the generation prompt.

        Returns:
            The text, and the character span of each generation marker.

        Raises:
            UserError: The template rejects the messages, or there is another template for tools.
        """
        if tools and self._without_tools:
            raise UserError(
                "the tokenizer has another chat template for tools (tool_use); give one template for all records with "
                "--chat_template"
            )
        blocks: list[str] = []
        generated: list[Span] = []
        messages = [_with_thinking(message) for message in messages]
        variables = {**self._variables, "messages": messages, "tools": tools, "add_generation_prompt": prompt}
        try:
            with self._compiled.environment.activate_tracker(blocks, generated):  # as render_jinja_template does
                blocks.extend(self._compiled.root_render_func(self._compiled.new_context(variables, shared=True)))
        except Exception as error:  # a template can raise any type of exception
            raise UserError(f"the chat template rejects the messages: {first_line(error)}") from None
        return "".join(blocks), generated
