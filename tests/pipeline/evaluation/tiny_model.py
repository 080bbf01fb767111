"""Example records in three languages, and a tiny Qwen2 with a tokenizer trained on them."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, set_seed

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
        initializer_range=0.2,  # logits far from uniform, so that rounding does not decide the argmax
    )
    return Qwen2ForCausalLM(config)


def overfit(tokenizer, records, steps=300) -> Qwen2ForCausalLM:
    """Train a tiny model until it reproduces these conversations."""
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


def save(model, tokenizer, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
