"""Batched greedy generation with a tiny random model, against a loop over its logits."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.common.errors import UserError
from pipeline.evaluation.dataset import read_examples
from pipeline.evaluation.generation import encode_prompts, generate, generate_batches, load_for_generation, plan_batches
from pipeline.evaluation.reasoning import split_reasoning
from tests.model_code import AUTO_MAP, write_model_with_code
from tests.pipeline.evaluation.tiny_model import TEMPLATE, make_records, make_tokenizer, overfit, save, write_records


def reference_greedy(model, prompt: list[int], end: int, max_new_tokens: int) -> list[int]:
    """Take the argmax token by token on the whole sequence: no cache, no padding, no batch."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == end:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


def test_generate_does_not_depend_on_batch_size(tmp_path, random_model_dir):
    examples = read_examples(write_records(tmp_path / "x.jsonl", make_records()))
    model, tokenizer = load_for_generation(random_model_dir, "float32")
    outputs = {size: generate(model, tokenizer, examples, size, max_new_tokens=24) for size in (1, 4, 18)}
    assert outputs[1] == outputs[4] == outputs[18]
    assert len({generation.text for generation in outputs[1]}) > 12  # the prompts do matter
    for example, generation in zip(examples, outputs[1], strict=True):
        prompt = tokenizer.apply_chat_template(example.messages, add_generation_prompt=True)["input_ids"]
        expected = reference_greedy(model, prompt, tokenizer.eos_token_id, 24)
        assert generation.text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize("end", ["<|im_end|>\n", " [END]\n"], ids=["token", "plain text"])
def test_generate_stops_at_end_of_turn(tmp_path, end):
    """The model ends its turns with a token that is neither its own eos token nor the tokenizer's, or with a text."""
    records = make_records()[:6]
    chat = make_tokenizer([r["question"] + r["answer"] for r in records])
    chat.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    chat.chat_template = TEMPLATE.replace("</s>", end)
    model = overfit(chat, records, steps=120)
    model_dir = save(model, chat, tmp_path / "model")
    assert chat.eos_token == "</s>" and model.generation_config.eos_token_id == chat.eos_token_id
    loaded, chat = load_for_generation(model_dir, "float32")
    examples = read_examples(write_records(tmp_path / "x.jsonl", records))
    generations = generate(loaded, chat, examples, 6, max_new_tokens=40)
    assert [generation.text.rstrip() for generation in generations] == [record["answer"] for record in records]
    assert all(generation.finished for generation in generations)


@pytest.mark.parametrize("opening", ["", "<think>\n"], ids=["model opens", "prompt opens"])
def test_generate_separates_reasoning(tmp_path, opening):
    """A model thinks before its answer. A response that is cut within the reasoning has no answer."""
    records = [r | {"answer": f"<think>\nmaybe 9{r['gold']}\n</think>\n\n{r['answer']}"} for r in make_records()[:6]]
    chat = make_tokenizer([r["question"] + r["answer"] for r in records])
    model = save(overfit(chat, records, steps=150), chat, tmp_path / "model")
    template = TEMPLATE.replace("<|assistant|>{% endif %}", f"<|assistant|>{opening}{{% endif %}}")
    loaded, chat = load_for_generation(model, "float32", chat_template=template)
    examples = read_examples(write_records(tmp_path / "x.jsonl", records))
    for generation, record in zip(generate(loaded, chat, examples, 6, max_new_tokens=60), records, strict=True):
        assert (generation.text, generation.finished) == (record["answer"].rpartition("\n")[2], True)
        assert generation.reasoning == f"maybe 9{record['gold']}"
    thoughts = chat("<think>\nmaybe 9", add_special_tokens=False)["input_ids"]
    cut = generate(loaded, chat, examples, 6, max_new_tokens=len(thoughts))
    assert all(g.text == "" and g.reasoning and not g.finished for g in cut)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 3.", ("The answer is 3.", None)),
        ("<think>\n\n</think>\n\nThe answer is 3.", ("The answer is 3.", None)),
        ("1 + 2 is 3</think>The answer is 3.", ("The answer is 3.", "1 + 2 is 3")),
        ("Is 1 < 2? <think> is a tag.", ("Is 1 < 2? <think> is a tag.", None)),
        ("\n<think>1 + 2", ("", "1 + 2")),
    ],
)
def test_split_reasoning(text, expected):
    assert split_reasoning(text) == expected


def test_generate_batches_of_all_ranks_equal_one_rank(tmp_path, random_model_dir):
    examples = read_examples(write_records(tmp_path / "x.jsonl", make_records()))
    model, tokenizer = load_for_generation(random_model_dir, "float32")
    prompts = encode_prompts(tokenizer, examples)
    parts = []
    for rank in range(3):
        batches = plan_batches(prompts, 4, rank=rank, world_size=3)
        finished = generate_batches(model, tokenizer, prompts, batches, max_new_tokens=8)
        parts.append({i: generation for batch in finished for i, generation in batch.items()})
    assert [len(part) for part in parts] == [8, 6, 4]  # batches of 4, 4, 4, 4 and 2
    assert parts[0] | parts[1] | parts[2] == dict(enumerate(generate(model, tokenizer, examples, 4, max_new_tokens=8)))


def test_load_for_generation_offers_hub_ids_only_where_it_takes_them(tmp_path):
    with pytest.raises(UserError, match=r"directory .pipeline.export., or a Hub ID$"):
        load_for_generation(str(tmp_path / "none"), "auto")
    with pytest.raises(UserError, match=r"^Qwen/Qwen3-8B: no such directory; .*; download a model of the Hub first$"):
        load_for_generation(Path("Qwen/Qwen3-8B"), "auto")


def test_plan_batches_leaves_out_finished_ones():
    prompts = [[0] * length for length in (1, 5, 2, 4, 3)]
    assert plan_batches(prompts, 2) == [[1, 3], [4, 2], [0]]
    assert plan_batches(prompts, 2, done={1, 3, 4}) == [[4, 2], [0]]
    assert plan_batches(prompts, 2, done={1, 3, 4}, rank=1, world_size=2) == [[0]]


def test_load_runs_the_model_s_own_code_only_if_trusted(tmp_path, random_model_dir):
    """The code names another class than that of transformers."""
    model = shutil.copytree(random_model_dir, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    write_model_with_code(tmp_path / "code")
    for file in (tmp_path / "code").glob("*.py"):
        shutil.copy(file, model)
    (model / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": AUTO_MAP}))
    with pytest.raises(UserError, match="read that code, then set --trust_remote_code"):
        load_for_generation(model, "float32")
    loaded, tokenizer = load_for_generation(model, "float32", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM" and tokenizer.chat_template
