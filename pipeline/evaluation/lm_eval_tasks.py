"""Run lm-evaluation-harness (lm_eval) tasks on a model, and also score the outputs with our own answer extraction.

    python -m pipeline.evaluation.lm_eval_tasks --model runs/solar/hf --tasks mgsm_native_cot_sw --output runs/solar
    python -m pipeline.evaluation.lm_eval_tasks --model runs/solar/hf --tasks mine_sw --include_path tasks --output out

Tasks are built into lm_eval, with data from the Hub, or are YAML files in `--include_path`, whose data may be local.
See docs/evaluation.md. For several ranks, use `torchrun --nproc-per-node 8 -m pipeline.evaluation.lm_eval_tasks ...`.
Writes `harness.json`, `harness.md` and, for tasks that generate text, `harness_generations.jsonl`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from jsonargparse.typing import PositiveInt

from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.checkpoint.export_record import check_not_stale
from pipeline.common.atomic_io import ensure_writable, write_atomically
from pipeline.common.errors import UserError, exit_cleanly, storage_errors, write_error
from pipeline.common.optional_imports import import_optional
from pipeline.evaluation.accuracy import percent, versions
from pipeline.evaluation.answers.language_rules import language_in_name
from pipeline.evaluation.answers.number import equal, extract_answer, parse_gold
from pipeline.evaluation.reasoning import split_reasoning
from pipeline.evaluation.significance import wilson_interval
from pipeline.models.loading import ADAPTER_CONFIG
from pipeline.models.stop_tokens import stop_strings, stop_token_ids

PROPORTIONS = ("exact_match", "acc", "acc_norm")  # metrics that are 0 or 1 for each example


def evaluate_tasks(args: argparse.Namespace) -> None:
    """Run the tasks, and write the result files on rank 0.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, or the model or data cannot be loaded.
    """
    lm_eval = import_optional("lm_eval")
    output = Path(args.output or args.model)
    if not (args.output or output.is_dir()):
        raise UserError(f"--model {args.model} is not a directory; give the directory of the results with --output")
    manager = find_tasks(args.tasks, args.include_path)
    ensure_writable(output)
    try:
        results = lm_eval.simple_evaluate(
            model=build_model(args),
            tasks=args.tasks,
            task_manager=manager,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            gen_kwargs={"max_gen_toks": args.max_new_tokens},
            apply_chat_template=args.chat_template,
            bootstrap_iters=0,
        )
    except OSError as error:  # the data set does not exist, or there is no connection
        raise UserError(f"--tasks {' '.join(args.tasks)}: {str(error).strip().splitlines()[0]}") from error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if results is not None:
        write_lm_eval_results(args, results, output)


def find_tasks(tasks: Sequence[str], include_path: str | None) -> Any:
    """Return a task manager for the tasks. The thousands of tasks in lm_eval are indexed only if needed.

    Raises:
        UserError: lm-eval is not installed, `include_path` is not a directory, or a task is unknown.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include_path {include_path}: no such directory; it holds the YAML files of tasks")
    manager_class = import_optional("lm_eval.tasks").TaskManager
    manager = manager_class(include_path=include_path, include_defaults=False) if include_path else None
    if manager is None or any(task not in manager.task_index for task in tasks):
        manager = manager_class(include_path=include_path)
    for task in tasks:
        if task not in manager.task_index:
            near = [name for name in manager.task_index if name.startswith(task.split("_")[0])][:6]
            hint = f"; similar tasks: {', '.join(near)}" if near else "; list the tasks with: lm-eval ls tasks"
            raise UserError(f"--tasks {task}: no such task{hint}; YAML files in --include_path add more")
    return manager


def build_model(args: argparse.Namespace) -> Any:
    """Build lm_eval's Hugging Face model with our tokenizer and distribution over ranks, or its vLLM model.

    Raises:
        UserError: the model cannot be loaded or is an adapter, vLLM is not installed, the chat template is missing, or
            the model is an export of a run that has a newer checkpoint.
    """
    if (Path(args.model) / ADAPTER_CONFIG).is_file():
        raise UserError(f"--model {args.model}: is an adapter; merge it into its base first (pipeline.export --merge)")
    if Path(args.model).is_dir():
        check_not_stale(Path(args.model))
    extra = import_optional("lm_eval.utils").simple_parse_args_string(args.model_args)
    options = {"pretrained": args.model, "dtype": args.dtype, "batch_size": args.batch_size, **extra}
    if args.backend == "vllm":
        try:
            return import_optional("lm_eval.api.registry").get_model("vllm")(**options)
        except ModuleNotFoundError:
            raise UserError("--backend vllm: vllm is not installed; pip install vllm on a machine with GPUs") from None
    options["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if Path(args.model).is_dir():
        options["tokenizer"] = load_tokenizer(args.model, for_training=False)
    try:
        model = _distributed_class(import_optional("lm_eval.models.huggingface").HFLM)(**options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--model {args.model}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if args.chat_template and not model.tokenizer.chat_template:
        raise UserError(f"--model {args.model}: its tokenizer has no chat template; use --no-chat_template")
    config = model.model.generation_config
    config.eos_token_id = stop_token_ids(config.eos_token_id, model.tokenizer)
    config.stop_strings = None  # generate() would require the tokenizer
    model.stop_strings = (stop_strings(model.tokenizer) or []) if args.chat_template else []
    return model


def _distributed_class(base: type) -> type:
    """Create a subclass of the lm_eval model that distributes examples over all ranks.

    The base class only does so if each process has access to several GPUs, and it numbers ranks per machine. A response
    also ends at `stop_strings`, in addition to the strings of its task.
    """

    class DistributedHFLM(base):
        stop_strings: Sequence[str] = ()

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            for request in requests if self.stop_strings else []:
                context, options = request.args
                until = options.get("until") or []
                until = [until] if isinstance(until, str) else until
                request.arguments = context, {**options, "until": [*until, *self.stop_strings]}
            return super().generate_until(requests, disable_tqdm)

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

    return DistributedHFLM


def write_lm_eval_results(args: argparse.Namespace, results: dict[str, Any], output: Path) -> None:
    """Write `harness.json`, `harness.md` and `harness_generations.jsonl` from the results of lm_eval."""
    tasks, rows = {}, []
    for task, samples in results["samples"].items():
        task_rows = extract_rows(task, samples)
        rows += task_rows
        n = len({sample["doc_id"] for sample in samples})
        tasks[task] = {
            "n": n,
            "lm_eval_compat": lm_eval_scores(results["results"][task], n),
            "ours": extraction_score(task_rows),
        }
    result = {
        "settings": {name: value for name, value in vars(args).items() if value is not None},
        "versions": versions() | {"lm_eval": import_optional("lm_eval").__version__},
        "tasks": tasks,
        "groups": {name: _numbers(metrics) for name, metrics in (results.get("groups") or {}).items()},
    }
    table = lm_eval_table(result)
    with storage_errors(output, write_error):
        if rows:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_atomically(output / "harness_generations.jsonl", lines.encode("utf-8", "replace"))
        write_atomically(output / "harness.md", f"# lm-evaluation-harness on {args.model}\n\n{table}\n".encode())
        write_atomically(output / "harness.json", (json.dumps(result, indent=2, ensure_ascii=False) + "\n").encode())
    print(f"{table}\n\nwritten: {output}/harness.json, harness.md", flush=True)


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if isinstance(value, int | float)}


def lm_eval_scores(metrics: dict[str, Any], n: int) -> dict[str, dict[str, float | None]]:
    """Return lm_eval's own metrics of a task.

    Args:
        metrics: metrics by lm_eval name, "metric,filter".
        n: number of examples.

    Returns:
        For each name `value`, and the bounds `low` and `high` of the 95 % Wilson interval; None if it is no proportion.
    """
    scores: dict[str, dict[str, float | None]] = {}
    for key, value in _numbers(metrics).items():
        metric = key.partition(",")[0]
        if "," not in key or metric.endswith("_stderr"):
            continue
        low, high = wilson_interval(round(value * n), n) if metric in PROPORTIONS and n else (None, None)
        scores[key] = {"value": float(value), "low": low, "high": high}
    return scores


def task_language(task: str) -> str | None:
    """Return the language of the solutions, from the task name (mgsm_native_cot_sw), or None if it names none."""
    if "_en_cot" in task:  # mgsm_en_cot_sw asks in Swahili for a chain of thought in English
        return "en"
    return language_in_name(task)


def extract_rows(task: str, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Extract the answers from the generations of a task with our own extraction. Return one row per example.

    Returns an empty list if the task's language is unknown, its targets are not numbers, or it generates no text.
    """
    lang, rows = task_language(task), {}
    for sample in samples:  # one sample per filter of the task, all with the same response
        gold = parse_gold(str(sample["target"]).strip())
        response = sample["resps"][0][0] if sample["resps"] and sample["resps"][0] else None
        if lang is None or gold is None or not isinstance(response, str):
            return []
        answer = extract_answer(split_reasoning(response)[0], lang)
        rows[sample["doc_id"]] = {
            "task": task,
            "doc_id": sample["doc_id"],
            "lang": lang,
            "output": response,
            "answer": None if answer is None else str(answer),
            "gold": str(gold),
            "correct": equal(answer, gold),
        }
    return [rows[doc_id] for doc_id in sorted(rows)]


def extraction_score(rows: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Compute the accuracy over the rows of `extract_rows` with its 95 % Wilson interval, or None without rows."""
    if not rows:
        return None
    correct = sum(row["correct"] for row in rows)
    low, high = wilson_interval(correct, len(rows))
    return {"accuracy": correct / len(rows), "low": low, "high": high}


def lm_eval_table(result: dict[str, Any]) -> str:
    """Format the content of `harness.json` as a Markdown table, with proportions in percent."""
    lines = [
        "| task | problems | lm_eval metric | value | 95 % interval | our accuracy % | 95 % interval |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for task, scores in result["tasks"].items():
        ours = scores["ours"] or {"accuracy": None, "low": None, "high": None}
        our_cells = f"{percent(ours['accuracy'])} | {percent(ours['low'])} to {percent(ours['high'])}"
        for index, (key, score) in enumerate(scores["lm_eval_compat"].items()):
            is_proportion = score["low"] is not None
            value = f"{percent(score['value'])} %" if is_proportion else f"{score['value']:.4g}"
            interval = f"{percent(score['low'])} to {percent(score['high'])}" if is_proportion else "–"
            name, n = (task, scores["n"]) if index == 0 else ("", "")
            lines.append(f"| {name} | {n} | {key} | {value} | {interval} | {our_cells if index == 0 else ' | '} |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Build the command-line parser."""
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m pipeline.evaluation.lm_eval_tasks", description=description)
    parser.add_argument("--model", required=True, help="directory of a Hugging Face causal LM, or a Hub model ID")
    parser.add_argument("--tasks", required=True, nargs="+", help="names of tasks, groups or tags")
    parser.add_argument("--include_path", help="directory with YAML files of additional tasks")
    parser.add_argument("--output", help="directory for the result files; default: the model directory")
    parser.add_argument("--backend", default="hf", choices=("hf", "vllm"), help="library that generates")
    parser.add_argument(
        "--model_args", default="", help="additional arguments for the backend: tensor_parallel_size=8,max_length=4096"
    )
    parser.add_argument("--batch_size", type=PositiveInt, default=16, help="sequences per batch on each rank")
    parser.add_argument("--max_new_tokens", type=PositiveInt, default=512, help="maximum response length, in tokens")
    parser.add_argument("--num_fewshot", type=int, help="number of few-shot examples; default: set by the task")
    parser.add_argument("--limit", type=PositiveInt, help="evaluate only the first LIMIT examples of each task")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument(
        "--chat_template",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="apply the chat template of the model",
    )
    return parser


if __name__ == "__main__":
    exit_cleanly(lambda: evaluate_tasks(build_parser().parse_args()))
