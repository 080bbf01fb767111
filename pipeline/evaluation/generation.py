"""Accuracy per language by greedy generation, and how often a language's answer equals the pivot's.

    python -m pipeline.evaluation --model runs/demo/hf --data runs/demo/train.test.jsonl --output runs/demo

On several GPUs or processes: `torchrun --nproc-per-node 8 -m pipeline.evaluation …`, `deepspeed --module
pipeline.evaluation …` or slurm/evaluate.sh; the records are split over the ranks and rank 0 writes the same files: one
line per record in `generations.jsonl`, figures in `evaluation.json`, a table in `evaluation.md`. Ended early, the same
command goes on from the batches that are finished; USR1 and TERM end it after the current one, with status 75.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from pipeline.common.errors import UserError
from pipeline.evaluation.dataset import Problem
from pipeline.evaluation.progress import Finished, Generation
from pipeline.evaluation.settings import Settings
from pipeline.fault_tolerance.signals import StopSignal
from pipeline.models.stop_tokens import stop_token_ids

# transformers' annotations do not tell that a causal LM generates, nor what a tokenizer's calls return.
Model = Any
Tokenizer = Any


def load_model(path: Path, dtype: str) -> tuple[Model, Tokenizer]:
    """Model in evaluation mode on this rank's device, and its tokenizer with a padding token.

    Raises UserError where the directory is missing, unusable or has no chat template.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; --model takes a Hugging Face model directory (pipeline.export)")
    try:
        tokenizer = load_tokenizer(path)
        model: Model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be loaded as a model ({str(error).strip().splitlines()[0]})") from None
    if not tokenizer.chat_template:
        raise UserError(f"{path}: the tokenizer has no chat template; add chat_template.jinja to the directory")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return model.to(device).eval(), tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    # Where config.json says qwen2 (and some others), AutoTokenizer takes the family's class, whose own pre-tokenizer
    # replaces the one in tokenizer.json: a tokenizer trained by data_prep would then cut its text differently.
    declared = get_tokenizer_config(path).get("tokenizer_class")
    generic = declared in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return (PreTrainedTokenizerFast if generic else AutoTokenizer).from_pretrained(path)


def generate(
    model: Model,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    settings: Settings,
    rank: int = 0,
    world_size: int = 1,
    finished: Finished | None = None,
    stop: StopSignal | None = None,
) -> dict[int, Generation]:
    """Greedy responses to this rank's share of the problems, by their position in `problems`.

    BatchSplit hold prompts of like length. They are made before they are shared out, so that a response does not
    depend on the number of ranks. Those in `finished` are left out, new ones added to it; after a signal the rest is
    left undone. Raises UserError where the chat template refuses a conversation or memory runs out.
    """
    prompts = [_prompt_ids(tokenizer, problem) for problem in problems]
    longest_first = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    size = settings.batch_size
    batches = [longest_first[start : start + size] for start in range(0, len(prompts), size)]
    batches = [batch for batch in batches if not (finished and finished.has(batch))][rank::world_size]
    config = _greedy(model, tokenizer, settings.max_new_tokens)
    generations: dict[int, Generation] = {}
    with tqdm(total=sum(map(len, batches)), desc="evaluate", unit="record", disable=rank != 0) as progress:
        for batch in batches:
            if stop and stop.received:
                break
            try:
                answers = _generate_batch(model, tokenizer, [prompts[i] for i in batch], config)
            except torch.OutOfMemoryError:
                raise UserError(f"out of GPU memory at --batch_size {size}; take a smaller one") from None
            done = dict(zip(batch, answers, strict=True))
            generations.update(done)
            if finished:
                finished.add(done)
            progress.update(len(batch))
    return generations


def _prompt_ids(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    try:
        encoded = tokenizer.apply_chat_template(problem.messages, add_generation_prompt=True, return_dict=True)
    except TemplateError as error:
        raise UserError(
            f"pair_id {problem.pair_id!r}, {problem.lang}: the chat template refuses it ({error})"
        ) from None
    return encoded["input_ids"]


def _greedy(model: Model, tokenizer: Tokenizer, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding: whatever sampling or penalties the model's own defaults ask for, only its ends count."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_token_ids(model.generation_config.eos_token_id, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.generation_config = config  # generate() fills what is unset from here
    return config


@torch.inference_mode()
def _generate_batch(
    model: Model, tokenizer: Tokenizer, prompts: list[list[int]], config: GenerationConfig
) -> list[Generation]:
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    tokens = model.generate(padded["input_ids"], attention_mask=padded["attention_mask"], generation_config=config)
    generations = []
    for row in tokens[:, padded["input_ids"].shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in (config.eos_token_id or [])), None)
        text = tokenizer.decode(row[:end], skip_special_tokens=True)
        generations.append(Generation(text, finished=end is not None))
    return generations
