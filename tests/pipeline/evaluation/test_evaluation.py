"""Evaluation: counting on planted answers, and generation with a tiny Qwen2 and a tokenizer trained here."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

from pipeline.common.distributed import free_port
from pipeline.common.errors import UserError
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL
from pipeline.evaluation import generation
from pipeline.evaluation.accuracy import accuracy_table, summarise, wilson_interval
from pipeline.evaluation.dataset import Problem, read_problems
from pipeline.evaluation.generation import generate, load_model
from pipeline.evaluation.runner import evaluate
from pipeline.evaluation.settings import Settings
from pipeline.fault_tolerance.signals import StopSignal
from tests.runs import ROOT

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PHRASES = {"en": "The answer is {}.", "de": "Die Antwort ist {}.", "bn": "উত্তর হল {}।"}
QUESTIONS = {"en": "{} plus {} is what?", "de": "Wie viel ist {} und {}?", "bn": "{} যোগ {} কত?"}
SUMS = [(1, 2), (3, 5), (20, 22), (7, 60), (11, 4), (100, 900)]


def make_records():
    records = []
    for i, (a, b) in enumerate(SUMS):
        for lang, question in QUESTIONS.items():
            padding = " please" * (3 * i)  # prompts of many lengths
            text = question.format(a, b) + padding
            answer = PHRASES[lang].format(a + b)
            records.append({"pair_id": f"p{i}", "lang": lang, "question": text, "answer": answer, "gold": a + b})
    return records


def write_records(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def make_tokenizer(texts) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(tokenizer, seed=0) -> Qwen2ForCausalLM:
    set_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,  # far from uniform, so that greedy choices are not coin tosses
    )
    return Qwen2ForCausalLM(config)


def save(model, tokenizer, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer([r["question"] + r["answer"] for r in make_records()])


@pytest.fixture(scope="module")
def random_model_dir(tokenizer, tmp_path_factory):
    model = make_model(tokenizer)
    model.generation_config.do_sample = True  # as many published models have: evaluation must stay greedy
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 1.8
    return save(model, tokenizer, tmp_path_factory.mktemp("random"))


def read_rows(path: Path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- counting


def problems_of(golds: dict[str, list[int]]):
    return [Problem(str(i), lang, [], Decimal(g)) for lang, column in golds.items() for i, g in enumerate(column)]


def test_summarise_counts_planted_answers():
    problems = problems_of({"en": [1, 2, 3, 4], "de": [1, 2, 3, 4], "sw": [1, 2]})
    planted = {"en": [1, 2, 9, None], "de": [1, 8, 9, None], "sw": [None, 2]}
    answers = [None if a is None else Decimal(a) for column in planted.values() for a in column]
    result = summarise(problems, answers, "en")
    languages = result["languages"]
    assert list(languages) == ["de", "en", "sw"]
    assert (languages["en"]["n"], languages["en"]["correct"], languages["en"]["accuracy"]) == (4, 2, 0.5)
    assert languages["en"]["consistency_with_pivot"] is None
    # de agrees on 1 and on the wrong 9; two absent answers do not agree.
    assert (languages["de"]["correct"], languages["de"]["consistency_with_pivot"]) == (1, 0.5)
    assert (languages["sw"]["correct"], languages["sw"]["consistency_with_pivot"]) == (1, 0.5)
    assert result["macro"] == {"accuracy": pytest.approx((0.5 + 0.25 + 0.5) / 3), "consistency_with_pivot": 0.5}
    table = accuracy_table(result)
    assert "| de | 4 | 25.0 |" in table
    assert "| en | 4 | 50.0 | 15.0 to 85.0 | – |" in table


def test_summarise_without_pivot_records():
    result = summarise(problems_of({"de": [1]}), [Decimal(1)], "en")
    assert result["languages"]["de"]["consistency_with_pivot"] is None
    assert result["macro"] == {"accuracy": 1.0, "consistency_with_pivot": None}
    assert "–" in accuracy_table(result)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Newcombe (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(correct, n, low, high):
    assert wilson_interval(correct, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


# --- reading


def test_read_problems_takes_questions_and_messages(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+3?"}]
    records = [
        {"pair_id": "a", "lang": "en", "question": "1+1?", "gold": "2,000"},
        {"pair_id": "a", "lang": "de", "question": "1+1?", "answer": "2", "gold": 2.0},
        {"pair_id": "b", "lang": "en", "messages": chat, "gold": 5},
        {"pair_id": "b", "lang": "de", "messages": [*chat, {"role": "assistant", "content": "5"}], "gold": "5"},
    ]
    problems = read_problems(write_records(tmp_path / "x.jsonl", records))
    assert problems[0] == Problem("a", "en", [{"role": "user", "content": "1+1?"}], Decimal(2000))
    assert problems[1].messages == problems[0].messages
    assert problems[2].messages == chat == problems[3].messages
    assert [p.pair_id for p in read_problems(tmp_path / "x.jsonl", limit=1)] == ["a", "a"]


GOOD = {"pair_id": "a", "lang": "en", "question": "1+1?", "gold": 2}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "empty file"),
        (["{"], "row 1: malformed JSON"),
        (["[1]"], "row 1: not a JSON object"),
        ([GOOD, {**GOOD, "lang": "de", "gold": None}], "row 2: `gold`"),
        ([{**GOOD, "gold": "eight"}], "row 1: `gold`"),
        ([{**GOOD, "lang": "xx"}], "row 1: unknown language 'xx'"),
        ([{k: v for k, v in GOOD.items() if k != "lang"}], "row 1: no `lang`"),
        ([{k: v for k, v in GOOD.items() if k != "question"}], "row 1: neither"),
        ([{**GOOD, "messages": [{"role": "assistant", "content": "5"}]}], "row 1: no message before"),
        ([GOOD, GOOD], "row 2: pair_id 'a' has two records in language 'en'"),
    ],
)
def test_bad_data_is_one_line(tmp_path, lines, message):
    path = tmp_path / "x.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    with pytest.raises(UserError) as caught:
        read_problems(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- models


def test_bad_models_are_one_line(tmp_path, tokenizer):
    data = write_records(tmp_path / "x.jsonl", [GOOD])
    empty = tmp_path / "empty"
    empty.mkdir()
    bare = make_tokenizer(["a b c"])
    bare.chat_template = None
    no_template = save(make_model(bare), bare, tmp_path / "bare")
    for model, message in [
        (tmp_path / "nowhere", "no such directory"),
        (empty, "cannot be loaded"),
        (no_template, "no chat template"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            evaluate(Settings(model=str(model), data=str(data), output=str(tmp_path / "out")))
        assert "\n" not in str(caught.value)
        assert str(model) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_command_line_ends_with_status_2(tmp_path):
    command = [sys.executable, "-m", "pipeline.evaluation", "--local_rank=0", "--model", "none", "--data", "none.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: none.jsonl: no such file")
    assert done.stderr.count("\n") == 1


# --- generation


def reference_greedy(model, prompt: list[int], end: int, max_new_tokens: int) -> list[int]:
    """Argmax after argmax on the whole sequence: no cache, no padding, no batch."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == end:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


def test_batching_and_padding_do_not_change_the_answers(tmp_path, random_model_dir):
    problems = read_problems(write_records(tmp_path / "x.jsonl", make_records()))
    model, tokenizer = load_model(random_model_dir, "float32")
    outputs = {}
    for batch_size in (1, 4, 18):
        settings = Settings(model="", data="", batch_size=batch_size, max_new_tokens=24)
        outputs[batch_size] = generate(model, tokenizer, problems, settings)
    assert outputs[1] == outputs[4] == outputs[18]
    assert len({g.text for g in outputs[1].values()}) > 12  # the prompts do matter
    for i, problem in enumerate(problems):
        prompt = tokenizer.apply_chat_template(problem.messages, add_generation_prompt=True)["input_ids"]
        expected = reference_greedy(model, prompt, tokenizer.eos_token_id, 24)
        assert outputs[1][i].text == tokenizer.decode(expected, skip_special_tokens=True)


def test_ranks_share_the_problems_out(tmp_path, random_model_dir):
    problems = read_problems(write_records(tmp_path / "x.jsonl", make_records()))
    model, tokenizer = load_model(random_model_dir, "float32")
    settings = Settings(model="", data="", batch_size=4, max_new_tokens=8)
    parts = [generate(model, tokenizer, problems, settings, rank, 3) for rank in range(3)]
    assert [len(part) for part in parts] == [8, 6, 4]  # batches of 4, 4, 4, 4 and 2
    assert parts[0] | parts[1] | parts[2] == generate(model, tokenizer, problems, settings)


def test_ended_by_a_signal_it_goes_on_from_the_finished_batches(tmp_path, random_model_dir, monkeypatch):
    data = write_records(tmp_path / "x.jsonl", make_records())
    settings = Settings(str(random_model_dir), str(data), str(tmp_path / "whole"), batch_size=4, max_new_tokens=8)
    assert evaluate(settings) == 0

    calls = 0

    def counted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 2:
            signal.raise_signal(signal.SIGUSR1)
        return original(*arguments)

    original = generation._generate_batch
    monkeypatch.setattr(generation, "_generate_batch", counted)
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    broken = dataclasses.replace(settings, output=str(tmp_path / "broken"))
    try:
        assert evaluate(broken, StopSignal()) == STOPPED_BY_SIGNAL
        assert calls == 2 and not (tmp_path / "broken" / "evaluation.json").exists()
        assert evaluate(broken, StopSignal()) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert calls == 5  # 18 records in batches of 4: none was generated twice
    whole, other = ((tmp_path / name / "generations.jsonl").read_bytes() for name in ("whole", "broken"))
    assert whole == other
    assert not (tmp_path / "broken" / "generations.partial").exists()


def overfit(tokenizer, records, steps=300) -> Qwen2ForCausalLM:
    """A tiny model that has learnt these conversations by heart."""
    model = make_model(tokenizer)
    model.config.initializer_range = 0.02
    model.init_weights()
    rows = []
    for r in records:
        chat = [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]
        rows.append(tokenizer.apply_chat_template(chat)["input_ids"])
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.slow
def test_known_accuracy_end_to_end_on_one_and_two_ranks(tmp_path, tokenizer):
    """A model that learnt its answers by heart scores them; wrong golds count against it; ranks change no byte."""
    records = make_records()
    model_dir = save(overfit(tokenizer, records), tokenizer, tmp_path / "model")
    tested = [dict(r) for r in records]
    for record in tested:  # two German golds differ from what the model says
        if record["lang"] == "de" and record["pair_id"] in ("p0", "p3"):
            record["gold"] += 1
    data = write_records(tmp_path / "test.jsonl", tested)
    base = ["-m", "pipeline.evaluation", "--model", str(model_dir), "--data", str(data), "--batch_size", "4"]
    base += ["--max_new_tokens", "40", "--dtype", "float32"]
    root = ROOT
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    outputs = {}
    for world_size in (1, 2):
        out = outputs[world_size] = tmp_path / f"out{world_size}"
        ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world_size)} for r in range(world_size)]
        running = [
            subprocess.Popen(
                [sys.executable, *base, "--output", str(out)],
                cwd=root,
                env=environment | (address | rank if world_size > 1 else {}),
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in ranks
        ]
        for process in running:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors
    one, two = outputs[1], outputs[2]
    assert (one / "generations.jsonl").read_bytes() == (two / "generations.jsonl").read_bytes()
    result, other = (json.loads((out / "evaluation.json").read_text()) for out in (one, two))
    assert result["languages"] == other["languages"]
    assert {p.name for p in one.iterdir()} == {"generations.jsonl", "evaluation.json", "evaluation.md"}

    rows = read_rows(one / "generations.jsonl")
    assert [(r["pair_id"], r["lang"]) for r in rows] == [(r["pair_id"], r["lang"]) for r in records]
    assert [r["output"] for r in rows] == [r["answer"] for r in records]
    assert all(r["finished"] for r in rows)
    accuracies = {lang: score["accuracy"] for lang, score in result["languages"].items()}
    assert accuracies == {"bn": 1.0, "de": pytest.approx(4 / 6), "en": 1.0}
    assert result["macro"]["consistency_with_pivot"] == 1.0
    assert result["versions"]["torch"] == torch.__version__
    assert result["settings"]["batch_size"] == 4
    assert accuracy_table(result) in (one / "evaluation.md").read_text()
