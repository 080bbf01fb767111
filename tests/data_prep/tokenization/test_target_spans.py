"""The target tokens are the assistant's text and its end of turn, with the chat templates of model families in use."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tokenization.chat_template import ChatEncoder
from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.common.errors import UserError
from tests.data_prep.tokenization.templates import END, TEMPLATES, add_turn_tokens


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **fields: str) -> dict:
    return {"role": "assistant", "content": text, **fields}


@pytest.fixture(scope="module")
def make_encoder(tokenizer_dir, tmp_path_factory):
    """Return a function that builds an encoder with one of `TEMPLATES`, through the loader."""
    folder = tmp_path_factory.mktemp("turns")
    add_turn_tokens(load_tokenizer(tokenizer_dir)).save_pretrained(folder)
    tokenizers: dict = {}

    def make(name: str, supervise: str = "all", **variables):
        key = name, json.dumps(variables)
        if key not in tokenizers:
            template = TEMPLATES.get(name, name)
            tokenizers[key] = load_tokenizer(folder, chat_template=template, chat_template_kwargs=variables)
        return tokenizers[key], ChatEncoder(tokenizers[key], supervise)

    return make


def targets(made, messages: list[dict], tools: list | None = None) -> str:
    """Return the decoded target tokens."""
    tokenizer, encoder = made
    (result,) = encoder.encode([messages], [tools])
    if isinstance(result, UserError):
        raise result
    return tokenizer.decode([~token for token in result if token < 0])


TURNS = [user("one"), assistant("first answer"), user("two"), assistant("7 and last")]
TAGS = "<think>\nlast thoughts\n</think>\n\n"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("with_system", [False, True])
def test_targets_are_responses_and_ends_of_turn(name, with_system, make_encoder):
    end = END[name]
    messages = [system("Be brief."), *TURNS] if with_system else TURNS
    decoded = targets(make_encoder(name), messages).replace(f"{end} ", end)
    assert decoded.lstrip() == f"first answer{end}7 and last{end}"
    assert targets(make_encoder(name, "last"), messages).lstrip() == f"7 and last{end}"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("as_field", [False, True])
def test_targets_with_reasoning(name, as_field, make_encoder):
    """Only what the template keeps is a target. A generation prompt that opens the think block is none."""

    def respond(thoughts: str, answer: str) -> dict:
        if as_field:
            return assistant(answer, reasoning_content=thoughts)
        return assistant(f"<think>\n{thoughts}\n</think>\n\n{answer}")

    messages = [user("one"), respond("early thoughts", "first"), user("two"), respond("last thoughts", "second")]
    made, end = make_encoder(name), END[name]
    if name == "r1":
        with pytest.raises(UserError, match=r"leaves out the reasoning of the last response; .*--chat_template"):
            targets(made, messages)
        return
    decoded = targets(made, messages).replace(f"{end} ", end).lstrip()
    early = "" if name.startswith("qwen3") else "<think>\nearly thoughts\n</think>\n\n"
    last = TAGS.removeprefix("<think>\n") if name == "qwen3_thinking" else TAGS
    assert decoded == f"{early}first{end}{last}second{end}"


def test_template_that_reads_reasoning_as_thinking(make_encoder):
    """As that of gpt-oss; transformers passes the reasoning under this name, too."""
    made = make_encoder(
        "{% for m in messages %}{{ '<|U|>' if m.role == 'user' else '<|A|>' }}"
        "{% if m.thinking is defined %}{{ '[' + m.thinking + ']' }}{% endif %}{{ m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|A|>' }}{% endif %}"
    )
    messages = [user("one"), assistant("answer", reasoning_content="thoughts")]
    assert targets(made, messages) == "[thoughts]answer</s>"
    assert made[0].apply_chat_template(messages, tokenize=False) == "<|U|>one</s><|A|>[thoughts]answer</s>"


TEXT = st.text(st.sampled_from("ab 1é你🦒\n.<>|/'\"{}%"), min_size=1, max_size=12).filter(str.strip)


@pytest.mark.parametrize("name", TEMPLATES)
def test_targets_of_any_text(name, make_encoder):
    """Every response is either refused or supervised whole, up to white space that the template trims."""
    made, end, accepted = make_encoder(name), END[name], []

    @settings(max_examples=40, derandomize=True)
    @given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), st.booleans())
    def check(turns, with_system):
        messages = [system("S"), *(m for q, a in turns for m in (user(q), assistant(a)))]
        try:
            decoded = targets(made, messages if with_system else messages[1:])
        except UserError as error:
            assert "prefix of the conversation's tokens" in str(error)  # "\n" of prompt and response are one token
            return
        accepted.append(decoded)
        assert [text.strip() for text in decoded.split(end)] == [*(answer.strip() for _, answer in turns), ""]

    check()
    assert len(accepted) > 25


def test_empty_think_blocks_are_no_targets(make_encoder):
    """The template inserts one, or the data contains one."""
    for variables in ({}, {"enable_thinking": False}):
        for answer in ("answer", "<think>\n\n</think>\n\nanswer"):
            made = make_encoder("qwen3", **variables)
            assert targets(made, [user("q"), assistant(answer)]) == "answer<|im_end|>"
            assert bool(made[1].prompt_mismatch([user("q"), assistant(answer)])) == (not variables)
    for text in ("/no_think", "/think"):
        assert targets(make_encoder("smollm3"), [system(text), user("q"), assistant("yes")]) == "yes<|im_end|>"


def test_variables_become_defaults_of_the_template(make_encoder):
    tokenizer, _ = make_encoder("qwen3", enable_thinking=False)
    for variables, prompt in (({}, "<think>\n\n</think>\n\n"), ({"enable_thinking": True}, "")):
        text = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True, **variables)
        assert text.endswith(f"<|im_start|>assistant\n{prompt}")


@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_templates_with_strict_alternation_reject_other_conversations(name, make_encoder):
    with pytest.raises(UserError, match=r"^the chat template rejects the messages: roles must alternate$"):
        targets(make_encoder(name), [user("a"), user("b"), assistant("c")])


@pytest.mark.parametrize("name", ["llama3.2", "smollm3"])
def test_clock_of_templates_is_fixed(name, make_encoder):
    tokenizer, _ = make_encoder(name)
    assert "26 Jul" in tokenizer.apply_chat_template(TURNS, tokenize=False)
    with pytest.raises(UserError, match="clock in a format that it computes"):
        make_encoder("{{ strftime_now(format) }}")


def test_prompt_mismatch_describes_other_generation_prompt(make_encoder):
    assert "<think>" in make_encoder("r1")[1].prompt_mismatch(TURNS)
    texts = "'<|im_start|>assistant\\n', but in the data the response follows '<|im_start|>assistant\\n<think>"
    assert texts in make_encoder("qwen3")[1].prompt_mismatch([user("q"), assistant("a")])
    assert not make_encoder("phi3")[1].prompt_mismatch(TURNS)


def test_tools_are_rendered_and_tool_calls_refused(make_encoder):
    made, tools = make_encoder("qwen2.5"), [{"name": "add", "parameters": {}}]
    assert targets(made, TURNS, tools) == targets(made, TURNS)
    (with_tools,), (without,) = made[1].encode([TURNS], [tools]), made[1].encode([TURNS])
    assert len(with_tools) > len(without)
    call = {**assistant(""), "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    calls = [user("q"), call, {"role": "tool", "content": "4"}, assistant("It is 4.")]
    with pytest.raises(UserError, match="tool calls cannot be trained on; pack with --supervise last"):
        targets(made, calls, tools)
    assert targets(make_encoder("qwen2.5", "last"), calls, tools) == "It is 4.<|im_end|>"
    with pytest.raises(UserError, match="tool calls cannot be trained on; remove the record"):
        targets(make_encoder("qwen2.5", "last"), [user("q"), {**call, "content": "I add."}], tools)


def test_refuses_tools_if_their_template_is_another_one(make_encoder):
    """transformers would use it to generate, and the packed prompt would lack the tools."""
    tokenizer, _ = make_encoder("qwen2.5")
    both = copy.deepcopy(tokenizer)
    both.chat_template = {"default": TEMPLATES["phi3"], "tool_use": TEMPLATES["qwen2.5"]}
    for tools in (None, []):
        assert targets((both, ChatEncoder(both)), TURNS, tools)
    with pytest.raises(UserError, match=r"another chat template for tools \(tool_use\); give one .*--chat_template"):
        targets((both, ChatEncoder(both)), TURNS, [{"name": "add", "parameters": {}}])


def test_refuses_tools_that_look_like_a_placeholder(make_encoder):
    with pytest.raises(UserError, match="the response cannot be located"):
        targets(make_encoder("qwen2.5"), TURNS, [{"name": "qxplaceholder000099x"}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content | replace('7', '8') + eos_token }}{% endfor %}", "changes the text"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "writes no end of turn"),
        ("{% for m in messages %}{{ m.content + m.content + '</s>' }}{% endfor %}", "leaves out or repeats"),
        ("{% for m in messages[-2:] %}{{ m.role + m.content + '</s>' }}{% endfor %}", "leaves out or repeats"),
        ("{% for m in messages | reverse %}{{ m.content + '</s>' }}{% endfor %}", "changes or moves the last response"),
        (
            "{% for m in messages %}{{ m.content + ('</s>' if loop.last else '<|end|>') }}{% endfor %}",
            "ends the response in message 2 differently",
        ),
    ],
)
def test_refuses_responses_that_cannot_be_located(template, message, make_encoder):
    with pytest.raises(UserError, match=message):
        targets(make_encoder(template), TURNS)
