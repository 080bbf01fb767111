"""Evaluate a model: generate responses, score them, and write the result files."""

import dataclasses
import os
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed
from transformers.utils.hub import cached_file, extract_commit_hash

from pipeline.checkpoint.export_record import check_not_stale, read_export_record
from pipeline.common import distributed
from pipeline.common.atomic_io import ensure_writable, sha256_file
from pipeline.common.errors import UserError
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL
from pipeline.evaluation.accuracy import versions
from pipeline.evaluation.dataset import Example, read_examples
from pipeline.evaluation.generation import encode_prompts, generate_batches, load_for_generation, plan_batches
from pipeline.evaluation.progress import Generation, GenerationLog, protect_export, read_inputs
from pipeline.evaluation.prompts import PLAIN_TEMPLATE, add_few_shot, read_chat_template
from pipeline.evaluation.results import write_results
from pipeline.evaluation.sampling import Sampling, response_seed
from pipeline.evaluation.server import Server, ServerRequest, generate_by_server
from pipeline.evaluation.settings import EvaluationSettings, check_settings, comparable_settings
from pipeline.fault_tolerance.signals import StopSignal
from pipeline.models.fingerprint import model_fingerprint

# Generates the responses that are not in a container of indices, and yields them as they are finished.
Generator = Callable[[Container[int]], Iterator[dict[int, Generation]]]


def evaluate(settings: EvaluationSettings, stop: StopSignal | None = None) -> int:
    """Generate and score responses, and write `evaluation.json`, `evaluation.md` and `generations.jsonl`.

    If any rank receives a signal, nothing is scored, and the next run resumes after the finished batches. Ranks that
    did not receive the signal finish their batches before exiting.

    Returns:
        The exit status: 0, or 75 after a signal.

    Raises:
        UserError: the model is missing or cannot be used, a record is malformed, or the output directory is not
            writable.
        ServerError: the server has not answered for `server_timeout` seconds.
    """
    check_settings(settings)
    examples = read_examples(Path(settings.data), settings.limit)
    asked = examples
    if settings.few_shot is not None:
        asked = add_few_shot(examples, Path(settings.few_shot), settings.num_shots)
    output = Path(settings.output or settings.model)
    if not (settings.output or output.is_dir()):
        raise UserError(f"--model {settings.model} is not a directory; give the directory of the results with --output")
    with _process_group():
        # Only rank 0 checks: if a checkpoint is completed meanwhile, the ranks would not agree.
        distributed.broadcast_from_rank0(lambda: _check_may_evaluate(settings))
        with protect_export(output, None if settings.base_url else read_export_record(Path(settings.model))):
            prepare = _prepare_server if settings.base_url else _prepare_model
            identity, generate = prepare(settings, asked)
            ensure_writable(output)
            log = GenerationLog(output, _inputs(settings, identity))
        local = _collect(generate(log.generations), log, stop)
        generations = log.generations | (_gather_generations(local) or {})
        total = len(examples) * settings.num_samples

        def score() -> bool:
            if len(generations) < total:
                return False
            write_results(settings, identity, output, examples, [generations[i] for i in range(total)])
            log.remove()
            return True

        # The other ranks wait: srun kills ranks that run for a minute longer than the first one that exits.
        return 0 if distributed.broadcast_from_rank0(score) else STOPPED_BY_SIGNAL


def _prepare_model(settings: EvaluationSettings, examples: Sequence[Example]) -> tuple[dict[str, Any], Generator]:
    """Load the model and encode the prompts. Collective: all ranks must call it.

    Returns:
        The entry `model` of `evaluation.json`, and the generator of responses. Response i is number i % num_samples of
        example i // num_samples.
    """
    template = read_chat_template(Path(settings.chat_template)) if settings.chat_template else None
    default = PLAIN_TEMPLATE if settings.few_shot else None
    path = Path(settings.model) if Path(settings.model).is_dir() else settings.model
    model, tokenizer = load_for_generation(path, settings.dtype, template, default, settings.trust_remote_code)
    encoded = encode_prompts(tokenizer, examples, settings.chat_template_kwargs)
    prompts = [prompt for prompt in encoded for _ in range(settings.num_samples)]
    seeds = _seeds(settings, examples)
    sampling = Sampling(settings.temperature, settings.top_p, seeds) if settings.temperature else None
    identity = distributed.broadcast_from_rank0(lambda: _model_identity(path, model))

    def generate(done: Container[int]) -> Iterator[dict[int, Generation]]:
        batches = plan_batches(prompts, settings.batch_size, done, distributed.rank(), distributed.world_size())
        return generate_batches(model, tokenizer, prompts, batches, settings.max_new_tokens, sampling)

    return identity, generate


def _prepare_server(settings: EvaluationSettings, examples: Sequence[Example]) -> tuple[dict[str, Any], Generator]:
    """Return the same as `_prepare_model` for a server."""
    assert settings.base_url is not None
    if with_tools := next((example for example in examples if example.tools), None):
        raise UserError(
            f"pair_id {with_tools.pair_id!r}, {with_tools.lang}: the record has `tools`, which servers handle in "
            "different ways; evaluate without --base_url"
        )
    server = Server(
        settings.base_url,
        settings.model,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_p,
        settings.chat_template_kwargs,
        settings.server_timeout,
    )
    requests = [
        ServerRequest(f"pair_id {example.pair_id!r}, {example.lang}", example.messages)
        for example in examples
        for _ in range(settings.num_samples)
    ]
    if settings.temperature:
        seeds = _seeds(settings, examples)
        requests = [request._replace(seed=seed) for request, seed in zip(requests, seeds, strict=True)]
    identity = {"dtype": "unknown precision", "server": settings.base_url, "name": settings.model, "export": None}

    def generate(done: Container[int]) -> Iterator[dict[int, Generation]]:
        missing = [i for i in range(len(requests)) if i not in done][distributed.rank() :: distributed.world_size()]
        return generate_by_server(server, {i: requests[i] for i in missing}, settings.batch_size)

    return identity, generate


def _seeds(settings: EvaluationSettings, examples: Sequence[Example]) -> list[int]:
    """Return the random seed of each response."""
    return [
        response_seed(settings.seed, example.pair_id, example.lang, sample)
        for example in examples
        for sample in range(settings.num_samples)
    ]


def can_resume(settings: EvaluationSettings) -> bool:
    """Return whether an interrupted evaluation with these settings has begun with the present export of its run."""
    logged = read_inputs(Path(settings.output or settings.model))
    if logged is None or not isinstance(logged.get("model"), dict):
        return False
    # The data type and the fingerprint are compared when the model has been loaded.
    export = None if settings.base_url else _export_record(Path(settings.model))
    model = logged["model"] | {"export": export}
    return logged == _inputs(settings, model)


def _check_may_evaluate(settings: EvaluationSettings) -> None:
    """Check that an export is not stale, unless it has been evaluated in part already.

    Raises:
        UserError: the run has a newer checkpoint, or the record of the export is damaged.
    """
    if settings.base_url is None and not settings.allow_stale and not can_resume(settings):
        check_not_stale(Path(settings.model))


def _export_record(path: Path) -> dict[str, Any] | None:
    record = read_export_record(path)
    return dataclasses.asdict(record) if record else None


def _model_identity(model_name: Path | str, model: Any) -> dict[str, Any]:
    """Return the entry `model` of `evaluation.json`.

    It has the data type, the record of an export, if any, and the fingerprint of a directory or the commit of a model
    of the Hub.
    """
    identity = {"dtype": str(model.dtype).removeprefix("torch."), "export": _export_record(Path(model_name))}
    if isinstance(model_name, Path):
        return identity | {"fingerprint": model_fingerprint(model_name)}
    try:
        config = cached_file(model_name, "config.json", local_files_only=True)
    except OSError:  # an adapter
        config = cached_file(model_name, "adapter_config.json", local_files_only=True)
    return identity | {"commit": extract_commit_hash(config, None)}


def _inputs(settings: EvaluationSettings, model: dict[str, Any]) -> dict[str, Any]:
    """Return everything that determines the generations: settings, input files, model and library versions."""
    files = {"data": settings.data, "chat_template": settings.chat_template, "few_shot": settings.few_shot}
    return {
        "settings": comparable_settings(settings),
        **{name: sha256_file(Path(file)) for name, file in files.items() if file is not None},
        "model": model,
        "versions": versions(),
    }


@contextmanager
def _process_group() -> Iterator[None]:
    """Initialize the process group for the duration of the block if there are several ranks."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    # gloo even on GPUs, because only text is exchanged, once. Ranks finish at different times, hence the long timeout.
    torch.distributed.init_process_group("gloo", timeout=timedelta(hours=6))
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _collect(
    finished: Iterator[dict[int, Generation]], log: GenerationLog, stop: StopSignal | None
) -> dict[int, Generation]:
    """Generate and log responses until all are finished or a signal is received."""
    generations: dict[int, Generation] = {}
    with closing(finished):  # type: ignore[type-var]
        while not (stop and stop.received) and (batch := next(finished, None)) is not None:
            log.add(batch)
            generations.update(batch)
    return generations


def _gather_generations(local: dict[int, Generation]) -> dict[int, Generation] | None:
    """Gather the generations of all ranks on rank 0. Return None on the other ranks.

    Collective: all ranks must call it.
    """
    if not torch.distributed.is_initialized():
        return local
    parts: list[Any] | None = [None] * distributed.world_size() if distributed.is_main_process() else None
    torch.distributed.gather_object(local, parts)
    return None if parts is None else {i: generation for part in parts for i, generation in part.items()}
