"""Load a Hugging Face causal LM and generate responses in batches, greedily or by seeded sampling."""

from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from tqdm import tqdm
from transformers import GenerationConfig

from data_prep.tokenization.template_rendering import check_variables
from data_prep.tokenization.tokenizer import is_path, load_tokenizer
from pipeline.common import distributed
from pipeline.common.errors import UserError, first_line
from pipeline.evaluation.dataset import Example
from pipeline.evaluation.progress import Generation
from pipeline.evaluation.reasoning import THINK, split_reasoning
from pipeline.evaluation.sampling import Sampling, sampling_processors
from pipeline.models.adapters import load_exported
from pipeline.models.loading import needs_own_code
from pipeline.models.stop_tokens import stop_strings, stop_token_ids

# The type annotations of transformers lack a causal LM's generate() and the return types of a tokenizer.
Model = Any
Tokenizer = Any

PROMPT_END = 16  # tokens at the end of a prompt that may open a think block


def load_for_generation(
    path: Path | str,
    dtype: str,
    chat_template: str | None = None,
    default_template: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Model, Tokenizer]:
    """Load a model or adapter in evaluation mode onto the device of this rank, and its tokenizer with a padding token.

    Args:
        path: directory, or Hub model ID as a string.
        dtype: data type, or "auto" for that of the model files.
        chat_template: Jinja template to use instead of the tokenizer's own.
        default_template: Jinja template of a tokenizer that has none.
        trust_remote_code: whether to run code of the model's repository.

    Raises:
        UserError: the directory is missing, cannot be loaded, or has no chat template.
    """
    if not Path(path).is_dir() and (isinstance(path, Path) or is_path(path)):
        also = "; download a model of the Hub first" if isinstance(path, Path) else ", or a Hub ID"
        raise UserError(
            f"{path}: no such directory; --model takes a Hugging Face model directory (pipeline.export){also}"
        )
    tokenizer: Tokenizer = load_tokenizer(path, for_training=False, chat_template=chat_template)
    tokenizer.chat_template = tokenizer.chat_template or default_template
    try:
        model: Model = load_exported(path, dtype, trust_remote_code)
    except Exception as error:  # an unreachable Hub can raise almost any exception
        reason = needs_own_code(error, "--trust_remote_code") or first_line(error)
        raise UserError(f"{path}: cannot be loaded as a model ({reason})") from None
    if not tokenizer.chat_template:
        raise UserError(
            f"{path}: the tokenizer has no chat template; give one with --chat_template FILE, or examples with "
            "--few_shot FILE"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return model.to(distributed.local_device()).eval(), tokenizer


def encode_prompts(
    tokenizer: Tokenizer, examples: Sequence[Example], chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """Apply the chat template to each example. Return the token ids up to the start of the response.

    Args:
        tokenizer: the tokenizer with its chat template.
        examples: the conversations.
        chat_template_kwargs: values of variables of the chat template, such as `enable_thinking`.

    Raises:
        UserError: the chat template lacks one of these variables, or rejects a conversation; the message names the
            variable, or the pair_id and language.
    """
    kwargs = dict(chat_template_kwargs or {})
    check_variables(tokenizer.get_chat_template(), kwargs)
    prompts = []
    for example in examples:
        try:
            encoded = tokenizer.apply_chat_template(
                example.messages, tools=example.tools, add_generation_prompt=True, return_dict=True, **kwargs
            )
        except TemplateError as error:
            raise UserError(
                f"pair_id {example.pair_id!r}, {example.lang}: the chat template rejects it ({error})"
            ) from None
        prompts.append(encoded["input_ids"])
    return prompts


def plan_batches(
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    done: Container[int] = (),
    rank: int = 0,
    world_size: int = 1,
) -> list[list[int]]:
    """Return the batches of this rank as indices into `prompts`, longest prompts first.

    Prompts of similar length share a batch. Batches are formed from all prompts before they are divided among the
    ranks, so that a response does not depend on the number of ranks. A batch is omitted if all its prompts are in
    `done`.
    """
    longest_first = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    batches = [longest_first[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
    return [batch for batch in batches if not all(i in done for i in batch)][rank::world_size]


def generate_batches(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    batches: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
) -> Iterator[dict[int, Generation]]:
    """Generate batch by batch, greedily or with `sampling`. Yield the responses of each batch by index into `prompts`.

    Raises:
        UserError: the GPU ran out of memory.
    """
    config = _set_greedy_config(model, tokenizer, max_new_tokens)
    quiet = not distributed.is_main_process()
    with tqdm(total=sum(map(len, batches)), desc="evaluate", unit="record", disable=quiet) as progress:
        for batch in batches:
            drawn = sampling and sampling._replace(seeds=[sampling.seeds[i] for i in batch])
            try:
                generations = _generate_batch(model, tokenizer, [prompts[i] for i in batch], config, drawn)
            except torch.OutOfMemoryError:
                raise UserError(f"out of GPU memory with {len(batch)} prompts; use a smaller --batch_size") from None
            progress.update(len(batch))
            yield dict(zip(batch, generations, strict=True))


def generate(
    model: Model, tokenizer: Tokenizer, examples: Sequence[Example], batch_size: int, max_new_tokens: int
) -> list[Generation]:
    """Generate the greedy response to each example in this process.

    Raises:
        UserError: the chat template rejects a conversation, or the GPU ran out of memory.
    """
    prompts = encode_prompts(tokenizer, examples)
    generations: dict[int, Generation] = {}
    for finished in generate_batches(model, tokenizer, prompts, plan_batches(prompts, batch_size), max_new_tokens):
        generations.update(finished)
    return [generations[i] for i in range(len(prompts))]


def _set_greedy_config(model: Model, tokenizer: Tokenizer, max_new_tokens: int) -> GenerationConfig:
    """Replace the generation defaults of the model with plain greedy decoding, which keeps only its stop tokens.

    The stop strings are those of the chat template.
    """
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_token_ids(model.generation_config.eos_token_id, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        stop_strings=stop_strings(tokenizer),
    )
    model.generation_config = config  # generate() takes unset options from here
    return config


@torch.inference_mode()
def _generate_batch(
    model: Model, tokenizer: Tokenizer, prompts: list[list[int]], config: GenerationConfig, sampling: Sampling | None
) -> list[Generation]:
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
    length = padded["input_ids"].shape[1]
    tokens = model.generate(
        padded["input_ids"],
        attention_mask=padded["attention_mask"],
        generation_config=config,
        logits_processor=sampling and sampling_processors(*sampling, length, config.max_new_tokens),
        tokenizer=tokenizer,
    )
    generations = []
    for prompt, row in zip(prompts, tokens[:, length:].tolist(), strict=True):
        end = next((i for i, token in enumerate(row) if token in (config.eos_token_id or [])), None)
        row = row[:end]
        text = tokenizer.decode(row, skip_special_tokens=True)
        stops = [text.index(stop) for stop in config.stop_strings or [] if stop in text]
        while end is None and row and row[-1] == config.pad_token_id:  # a stop string ended it before the others
            row.pop()
        finished = end is not None or bool(stops)
        is_thinking = tokenizer.decode(prompt[-PROMPT_END:]).rstrip().endswith(THINK)
        answer, reasoning = split_reasoning(text[: min(stops, default=None)], is_thinking)
        generations.append(Generation(answer, finished, len(row), reasoning))
    return generations
