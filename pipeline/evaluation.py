"""Accuracy per language by greedy generation, and how often a language's answer equals the pivot's.

    python -m pipeline.evaluation --model runs/demo/hf --data runs/demo/train.test.jsonl --output runs/demo

On several GPUs or processes: `torchrun --nproc-per-node 8 -m pipeline.evaluation …`, `deepspeed --module
pipeline.evaluation …` or slurm/evaluate.sh; the records are split over the ranks and rank 0 writes the same files: one
line per record in `generations.jsonl`, figures in `evaluation.json`, a table in `evaluation.md`. Ended early, the same
command goes on from the batches that are finished; USR1 and TERM end it after the current one, with status 75.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed
from jinja2 import TemplateError
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveInt
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from data_prep.errors import UserError, exit_cleanly
from data_prep.shards import sha256_file, write_atomically
from pipeline import dist
from pipeline.answers import answers_equal, extract_answer
from pipeline.consistency import beyond_accuracy, consistency_tables
from pipeline.finished import Finished, Generation
from pipeline.guard.stop import REQUEUE_EXIT_CODE, StopSignal
from pipeline.problems import Problem, read_problems
from pipeline.scores import accuracy_table, summarise, versions

# transformers' annotations do not tell that a causal LM generates, nor what a tokenizer's calls return.
Model = Any
Tokenizer = Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to evaluate and how.

    Args:
        model: directory of a Hugging Face causal LM with its tokenizer and chat template.
        data: JSON Lines of records {pair_id, lang, messages or question, gold}; gold is the final number.
        output: where the three result files go; the model's directory if not given.
        pivot: language the others' answers are compared with.
        batch_size: sequences generated at once on each rank.
        max_new_tokens: longest answer, in tokens.
        limit: take only the first so many problems, each in all its languages.
        dtype: arithmetic; auto takes that of the model's files.
    """

    model: str
    data: str
    output: str | None = None
    pivot: str = "en"
    batch_size: PositiveInt = 16
    max_new_tokens: PositiveInt = 512
    limit: PositiveInt | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


def evaluate(settings: Settings, stop: StopSignal | None = None) -> int:
    """Generate, score and write `evaluation.json`, `evaluation.md` and `generations.jsonl`. Returns the exit status.

    After a signal to any rank nothing is scored: the status is 75, and the next start goes on from the batches that are
    finished. A rank without the signal finishes its share first.

    Raises UserError for a missing or unusable model, a bad record, an unwritable output directory.
    """
    problems = read_problems(Path(settings.data), settings.limit)
    output = Path(settings.output or settings.model)
    with _process_group() as (rank, world_size):
        model, tokenizer = load_model(Path(settings.model), settings.dtype)
        make_writable(output)
        finished = Finished(output, _facts(settings))
        mine = generate(model, tokenizer, problems, settings, rank, world_size, finished, stop)
        generations = finished.generations | (_gather(mine, rank, world_size) or {})
        complete = dist.from_main(lambda: len(generations) == len(problems))
    if not complete:
        return REQUEUE_EXIT_CODE
    if rank != 0:
        return 0
    rows = [_row(problem, generations[i]) for i, problem in enumerate(problems)]
    result = {
        "settings": dataclasses.asdict(settings),
        "versions": versions(),
        **summarise(
            problems, [extract_answer(generations[i].text, p.lang) for i, p in enumerate(problems)], settings.pivot
        ),
        **beyond_accuracy(rows),
    }
    text = f"{accuracy_table(result)}\n\n{consistency_tables(result)}"
    _write(output / "generations.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    _write(output / "evaluation.md", f"# Evaluation of {settings.model}\n\n{text}\n")
    _write(output / "evaluation.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    finished.remove()
    print(f"{text}\n\nwritten: {output}/evaluation.json, evaluation.md, generations.jsonl", flush=True)
    return 0


def _facts(settings: Settings) -> dict[str, Any]:
    """What decides the generations: settings, test records, and size and time of the model's files."""
    files = sorted(path for path in Path(settings.model).iterdir() if path.is_file())
    return {
        "settings": dataclasses.asdict(dataclasses.replace(settings, output=None)),
        "data": sha256_file(Path(settings.data)),
        "model": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "versions": versions(),
    }


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

    Batches hold prompts of like length. They are made before they are shared out, so that a response does not
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


def end_tokens(own: int | list[int] | None, tokenizer: Tokenizer) -> list[int] | None:
    """The tokens that end a response: the model's own, and the tokenizer's, which a template may end turns with."""
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}) or None


def _greedy(model: Model, tokenizer: Tokenizer, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding: whatever sampling or penalties the model's own defaults ask for, only its ends count."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_tokens(model.generation_config.eos_token_id, tokenizer),
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


@contextmanager
def _process_group() -> Iterator[tuple[int, int]]:
    """Rank and world size: those of the launcher, with a process group, or 0 and 1."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield 0, 1
        return
    # gloo on GPUs too: only texts are exchanged, once. Ranks end apart from each other, hence the patience.
    torch.distributed.init_process_group("gloo", timeout=timedelta(hours=6))
    try:
        yield torch.distributed.get_rank(), world_size
    finally:
        torch.distributed.destroy_process_group()


def _gather(mine: dict[int, Generation], rank: int, world_size: int) -> dict[int, Generation] | None:
    """All ranks' generations on rank 0, None on the others."""
    if world_size == 1:
        return mine
    parts: list[Any] | None = [None] * world_size if rank == 0 else None
    torch.distributed.gather_object(mine, parts)
    return None if parts is None else {i: generation for part in parts for i, generation in part.items()}


def _row(problem: Problem, generation: Generation) -> dict[str, Any]:
    answer = extract_answer(generation.text, problem.lang)
    return {
        "pair_id": problem.pair_id,
        "lang": problem.lang,
        "output": generation.text,
        "finished": generation.finished,
        "answer": None if answer is None else str(answer),
        "gold": str(problem.gold),
        "correct": answers_equal(answer, problem.gold),
    }


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode("utf-8", "replace"))  # half a surrogate pair must not lose the run


def make_writable(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        writable = os.access(directory, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise UserError(f"{directory}: cannot be written to; give another --output")


def main() -> int:
    """Command line; the arguments are the fields of `Settings`."""
    stop = StopSignal()
    dist.join_slurm_step()
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]  # added by DeepSpeed's launcher
    return evaluate(auto_cli(Settings, args=arguments, as_positional=False), stop)


if __name__ == "__main__":
    exit_cleanly(main)
