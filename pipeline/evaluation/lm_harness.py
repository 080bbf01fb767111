"""Tasks of lm-evaluation-harness on a Hugging Face model, its scores beside those of our own answer extraction.

    python -m pipeline.evaluation.lm_harness --model runs/solar/hf --tasks mgsm_native_cot_sw --output runs/solar
    python -m pipeline.evaluation.lm_harness --model runs/solar/hf --tasks mine_sw --include_path tasks --output out

Tasks are the harness's own, whose data comes from the hub, or YAML files in `--include_path`, whose data may be local:
see docs/evaluation.md. On several ranks:
`torchrun --nproc-per-node 8 -m pipeline.evaluation.lm_harness ...`. Writes `harness.json`,
`harness.md` and, of tasks that generate text, `harness_generations.jsonl`.
"""

import argparse
import json
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from jsonargparse.typing import PositiveInt

from pipeline.common.atomic_io import ensure_writable, write_atomically
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.common.optional_imports import import_optional
from pipeline.evaluation.accuracy import versions, wilson_interval
from pipeline.evaluation.answer_extraction import LANGUAGES, answers_equal, extract_answer, parse_gold
from pipeline.evaluation.consistency import percent
from pipeline.evaluation.generation import load_tokenizer
from pipeline.models.stop_tokens import stop_token_ids

SHARES = ("exact_match", "acc", "acc_norm")  # metrics that are 0 or 1 for each problem


def evaluate_tasks(args: argparse.Namespace) -> None:
    """Run the tasks and write the files, on rank 0.

    Raises UserError where lm-eval is missing, a task is unknown, or model or data cannot be loaded.
    """
    lm_eval = import_optional("lm_eval")
    output = Path(args.output or args.model)
    if not (args.output or output.is_dir()):
        raise UserError(f"--model {args.model} is no directory; say with --output where the results go")
    manager = find_tasks(args.tasks, args.include_path)
    ensure_writable(output)
    try:
        found = lm_eval.simple_evaluate(
            model=build_model(args),
            tasks=args.tasks,
            task_manager=manager,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            gen_kwargs={"max_gen_toks": args.max_new_tokens},
            apply_chat_template=args.chat_template,
            bootstrap_iters=0,
        )
    except OSError as error:  # a data set that is not there, no connection
        raise UserError(f"--tasks {' '.join(args.tasks)}: {str(error).strip().splitlines()[0]}") from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if found is not None:
        write_results(args, found, output)


def find_tasks(tasks: Sequence[str], include_path: str | None) -> Any:
    """A task manager that knows the tasks; the harness's thousands are indexed only where they are called for."""
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include_path {include_path}: no such directory; it holds the YAML files of tasks")
    manager_class = import_optional("lm_eval.tasks").TaskManager
    manager = manager_class(include_path=include_path, include_defaults=False) if include_path else None
    if manager is None or any(task not in manager.task_index for task in tasks):
        manager = manager_class(include_path=include_path)
    for task in tasks:
        if task not in manager.task_index:
            near = [name for name in manager.task_index if name.startswith(task.split("_")[0])][:6]
            hint = f"; known are {', '.join(near)}" if near else "; lm-eval ls tasks lists those it ships"
            raise UserError(f"--tasks {task}: no such task{hint}, and YAML files in --include_path add others")
    return manager


def build_model(args: argparse.Namespace) -> Any:
    """The harness's model: its Hugging Face one with our tokenizer and ranks, or vLLM."""
    extra = import_optional("lm_eval.utils").simple_parse_args_string(args.model_args)
    options = {"pretrained": args.model, "dtype": args.dtype, "batch_size": args.batch_size, **extra}
    if args.backend == "vllm":
        try:
            return import_optional("lm_eval.api.registry").get_model("vllm")(**options)
        except ModuleNotFoundError:
            raise UserError("--backend vllm: vllm is not installed; pip install vllm on a machine with GPUs") from None
    options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if Path(args.model).is_dir():
        options["tokenizer"] = load_tokenizer(Path(args.model))
    try:
        model = _ranked(import_optional("lm_eval.models.huggingface").HFLM)(**options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {args.model}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if args.chat_template and not model.tokenizer.chat_template:
        raise UserError(f"--model {args.model}: its tokenizer has no chat template; say --no-chat_template")
    own = model.model.generation_config
    own.eos_token_id = stop_token_ids(own.eos_token_id, model.tokenizer)
    return model


def _ranked(base: type) -> type:
    """The harness's model with problems shared out over all ranks.

    Of its own it does so only where each process sees several GPUs, and it counts ranks anew on every machine.
    """

    class Ranked(base):
        @property
        def rank(self) -> int:
            return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0

        @property
        def world_size(self) -> int:
            return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            if self.world_size == 1:
                return tensor
            parts: list[Any] = [None] * self.world_size
            torch.distributed.all_gather_object(parts, tensor.cpu())
            return torch.stack(parts)

        def barrier(self) -> None:
            if self.world_size > 1:
                torch.distributed.barrier()

    return Ranked


def write_results(args: argparse.Namespace, found: dict[str, Any], output: Path) -> None:
    """harness.json, harness.md and harness_generations.jsonl."""
    tasks, rows = {}, []
    for task, samples in found["samples"].items():
        scored = own_rows(task, samples)
        rows += scored
        tasks[task] = {
            "n": len({sample["doc_id"] for sample in samples}),
            "lm_eval_compat": harness_scores(found["results"][task], len({sample["doc_id"] for sample in samples})),
            "ours": own_score(scored),
        }
    result = {
        "settings": {name: value for name, value in vars(args).items() if value is not None},
        "versions": versions() | {"lm_eval": import_optional("lm_eval").__version__},
        "tasks": tasks,
        "groups": {name: _plain(figures) for name, figures in (found.get("groups") or {}).items()},
    }
    table = harness_table(result)
    if rows:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(output / "harness_generations.jsonl", lines.encode("utf-8", "replace"))
    write_atomically(output / "harness.md", f"# lm-evaluation-harness on {args.model}\n\n{table}\n".encode())
    write_atomically(output / "harness.json", (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
    print(f"{table}\n\nwritten: {output}/harness.json, harness.md", flush=True)


def _plain(figures: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in figures.items() if isinstance(value, int | float)}


def harness_scores(figures: dict[str, Any], n: int) -> dict[str, dict[str, float | None]]:
    """The harness's own figures by "metric,filter": `value`; of those that are shares Wilson's `low` and `high` too."""
    scores: dict[str, dict[str, float | None]] = {}
    for key, value in _plain(figures).items():
        metric = key.partition(",")[0]
        if "," not in key or metric.endswith("_stderr"):
            continue
        low, high = wilson_interval(round(value * n), n) if metric in SHARES and n else (None, None)
        scores[key] = {"value": float(value), "low": low, "high": high}
    return scores


def task_language(task: str) -> str | None:
    """The language that a task's solutions are in, by its name (mgsm_native_cot_sw), where it is one of ours."""
    if "_en_cot" in task:  # mgsm_en_cot_sw asks in Swahili for a chain of thought in English
        return "en"
    named = [part for part in re.split(r"[_-]", task) if part in LANGUAGES]
    return named[-1] if named else None


def own_rows(task: str, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Generations of a task with a number as target, read by our own extraction; none of another task."""
    lang, rows = task_language(task), {}
    for sample in samples:  # one for each of the task's filters, all with the same response
        gold = parse_gold(str(sample["target"]).strip())
        response = sample["resps"][0][0] if sample["resps"] and sample["resps"][0] else None
        if lang is None or gold is None or not isinstance(response, str):
            return []
        answer = extract_answer(response, lang)
        rows[sample["doc_id"]] = {
            "task": task,
            "doc_id": sample["doc_id"],
            "lang": lang,
            "output": response,
            "answer": None if answer is None else str(answer),
            "gold": str(gold),
            "correct": answers_equal(answer, Decimal(gold)),
        }
    return [rows[doc_id] for doc_id in sorted(rows)]


def own_score(rows: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    if not rows:
        return None
    correct = sum(row["correct"] for row in rows)
    low, high = wilson_interval(correct, len(rows))
    return {"accuracy": correct / len(rows), "low": low, "high": high}


def harness_table(result: dict[str, Any]) -> str:
    """Markdown, in percent where a figure is a share."""
    lines = [
        "| task | problems | harness's figure | value | 95 % interval | our accuracy % | 95 % interval |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for task, found in result["tasks"].items():
        ours = found["ours"] or {"accuracy": None, "low": None, "high": None}
        own = f"{percent(ours['accuracy'])} | {percent(ours['low'])} to {percent(ours['high'])}"
        for place, (key, score) in enumerate(found["lm_eval_compat"].items()):
            share = score["low"] is not None
            value = f"{percent(score['value'])} %" if share else f"{score['value']:.4g}"
            interval = f"{percent(score['low'])} to {percent(score['high'])}" if share else "–"
            name, n = (task, found["n"]) if place == 0 else ("", "")
            lines.append(f"| {name} | {n} | {key} | {value} | {interval} | {own if place == 0 else ' | '} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluation.lm_harness", description=about)
    parser.add_argument("--model", required=True, help="directory of a Hugging Face causal LM, or a hub id")
    parser.add_argument("--tasks", required=True, nargs="+", help="names of tasks, groups or tags")
    parser.add_argument("--include_path", help="directory of further tasks' YAML files")
    parser.add_argument("--output", help="where the files go; the model's directory if not given")
    parser.add_argument("--backend", default="hf", choices=("hf", "vllm"), help="who generates")
    parser.add_argument("--model_args", default="", help="more for the backend: tensor_parallel_size=8,max_length=4096")
    parser.add_argument("--batch_size", type=PositiveInt, default=16, help="sequences at once on each rank")
    parser.add_argument("--max_new_tokens", type=PositiveInt, default=512, help="longest answer, in tokens")
    parser.add_argument("--num_fewshot", type=int, help="examples before each problem; the task's own if not given")
    parser.add_argument("--limit", type=PositiveInt, help="take only the first so many problems of each task")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    chat = argparse.BooleanOptionalAction
    parser.add_argument("--chat_template", action=chat, default=True, help="ask through the model's chat template")
    return parser


if __name__ == "__main__":
    exit_cleanly(lambda: evaluate_tasks(parser().parse_args()))
