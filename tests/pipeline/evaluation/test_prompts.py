"""Few-shot examples before each question, chat templates from files, base models, and models of the Hub."""

import dataclasses
import json
import shutil

import huggingface_hub.constants
import pytest

from pipeline.common.errors import UserError
from pipeline.evaluation.dataset import read_examples
from pipeline.evaluation.generation import encode_prompts, load_for_generation
from pipeline.evaluation.prompts import PLAIN_TEMPLATE, add_few_shot, read_chat_template
from pipeline.evaluation.runner import evaluate
from pipeline.evaluation.settings import EvaluationSettings
from tests.pipeline.evaluation.tiny_model import TEMPLATE, make_records, make_tokenizer, overfit, save, write_records

SHOTS = [
    {"pair_id": "s0", "lang": "en", "question": "2 plus 2 is what?", "answer": "The answer is 4."},
    {"pair_id": "s1", "lang": "en", "system": "Be short.", "question": "1 plus 2 is what?", "answer": "3."},
    {"pair_id": "s2", "lang": "de", "question": "Wie viel ist 2 und 2?", "answer": "4."},
    {"pair_id": "s3", "lang": "en", "question": "5 plus 5 is what?", "answer": "10."},
]


def test_add_few_shot_precedes_question_by_first_records(tmp_path) -> None:
    path = write_records(tmp_path / "shots.jsonl", SHOTS)
    records = [
        {"pair_id": "p0", "lang": "en", "system": "Think.", "question": "1 plus 2 is what?", "gold": 3},
        {"pair_id": "p1", "lang": "en", "question": "3 plus 5 is what?", "gold": 8},
    ]
    examples = read_examples(write_records(tmp_path / "x.jsonl", records))
    own, other = add_few_shot(examples, path, 2)
    assert [(m["role"], m["content"]) for m in own.messages] == [
        ("system", "Think."),
        ("user", "2 plus 2 is what?"),
        ("assistant", "The answer is 4."),
        ("user", "5 plus 5 is what?"),  # "1 plus 2" is the question itself
        ("assistant", "10."),
        ("user", "1 plus 2 is what?"),
    ]
    assert [m["content"] for m in other.messages][2:] == ["1 plus 2 is what?", "3.", "3 plus 5 is what?"]
    with pytest.raises(
        UserError, match=r"shots.jsonl: 2 records in language 'en' besides .* 'p0', but --num_shots is 3"
    ):
        add_few_shot(examples, path, 3)
    with pytest.raises(UserError, match="0 records in language 'sw'"):
        add_few_shot([examples[0]._replace(lang="sw")], path, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Question: how much?", "not a chat template, since it does not read `messages`"),
        ("{% for m in messages %}", "not a Jinja template"),
        (None, "cannot be read"),
    ],
)
def test_evaluate_refuses_files_that_are_no_chat_template(tmp_path, random_model_dir, content, message) -> None:
    data, file = write_records(tmp_path / "x.jsonl", make_records()[:1]), tmp_path / "t.jinja"
    if content is not None:
        file.write_text(content)
    settings = EvaluationSettings(str(random_model_dir), str(data), str(tmp_path / "out"), chat_template=str(file))
    with pytest.raises(UserError, match=message) as error:
        evaluate(settings)
    assert str(error.value).startswith(f"--chat_template {file}: ") and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_evaluate_base_model_with_template_or_few_shot(tmp_path) -> None:
    """A model without chat template was trained on plain text. Its continuation ends before the next question."""
    records = make_records()[:3]
    chat = make_tokenizer([PLAIN_TEMPLATE, *(r["question"] + r["answer"] for r in records)])
    chat.chat_template = PLAIN_TEMPLATE
    model = overfit(chat, records, steps=100)
    template = tmp_path / "template.jinja"
    template.write_text(PLAIN_TEMPLATE)
    chat.chat_template = None
    directory = save(model, chat, tmp_path / "model")
    data = write_records(tmp_path / "x.jsonl", records)
    settings = EvaluationSettings(str(directory), str(data), str(tmp_path / "out"), max_new_tokens=40)
    with pytest.raises(UserError, match=r"no chat template; give one with --chat_template FILE, or .* --few_shot FILE"):
        evaluate(settings)
    assert evaluate(dataclasses.replace(settings, chat_template=str(template))) == 0
    rows = [
        json.loads(line) for line in (tmp_path / "out" / "generations.jsonl").read_text("utf-8").split("\n") if line
    ]
    assert [row["output"].strip() for row in rows] == [record["answer"] for record in records]
    assert all(row["finished"] and row["correct"] for row in rows)

    _, tokenizer = load_for_generation(directory, "float32", default_template=PLAIN_TEMPLATE)
    shots = write_records(tmp_path / "shots.jsonl", make_records())
    examples = add_few_shot(read_examples(data), shots, 1)
    prompt = tokenizer.decode(encode_prompts(tokenizer, examples)[0])
    first, second = records[0], make_records()[3]
    assert prompt == (
        f"Question: {second['question']}\nAnswer: {second['answer']}\n\nQuestion: {first['question']}\nAnswer:"
    )
    assert evaluate(dataclasses.replace(settings, few_shot=str(shots), num_shots=1)) == 0
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["settings"]["few_shot"] == str(shots)


def test_read_chat_template_returns_text(tmp_path) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    assert read_chat_template(tmp_path / "t.jinja") == TEMPLATE


def test_evaluate_hub_model_from_cache(tmp_path, random_model_dir, monkeypatch) -> None:
    """The model is in the Hub's cache, as a download leaves it. Another one cannot be fetched without a connection."""
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "cache"
    repository = cache / "models--someone--tiny"
    shutil.copytree(random_model_dir, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    data = write_records(tmp_path / "x.jsonl", make_records()[:2])
    settings = EvaluationSettings("someone/tiny", str(data), str(tmp_path / "out"), max_new_tokens=4)
    with pytest.raises(UserError, match=r"--model someone/tiny is not a directory; .* with --output"):
        evaluate(dataclasses.replace(settings, output=None))
    assert evaluate(settings) == 0
    model = json.loads((tmp_path / "out" / "evaluation.json").read_text())["model"]
    assert model == {"commit": commit, "dtype": "float32", "export": None}
    for name, message in (("someone/absent", "cannot be loaded as a tokenizer"), ("./absent", "no such directory")):
        with pytest.raises(UserError, match=f"{name}: {message}") as error:
            evaluate(dataclasses.replace(settings, model=name, output=str(tmp_path / "other")))
        assert "\n" not in str(error.value)


def test_tools_reach_the_chat_template_and_are_refused_for_a_server(tmp_path) -> None:
    record = make_records()[0] | {"lang": "en", "tools": [{"name": "add"}]}
    data = write_records(tmp_path / "x.jsonl", [record])
    tokenizer = make_tokenizer(["add", record["question"]])
    tokenizer.chat_template = "{{ tools[0].name }} {{ messages[0].content }}"
    prompt = tokenizer.decode(encode_prompts(tokenizer, read_examples(data))[0])
    assert prompt == tokenizer.decode(tokenizer(f"add {record['question']}")["input_ids"])
    with pytest.raises(UserError, match=r"^--chat_template_kwargs: give `tools` in the records"):
        encode_prompts(tokenizer, read_examples(data), {"tools": []})
    settings = EvaluationSettings("tiny", str(data), str(tmp_path / "out"), base_url="http://localhost:1/v1")
    with pytest.raises(UserError, match=rf"^pair_id '{record['pair_id']}', en: the record has `tools`"):
        evaluate(settings)
