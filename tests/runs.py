"""Start the project's commands as a user does, and tiny models and shards to start them on."""

import atexit
import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data_prep.shards.format import MANIFEST, ShardSet, write_shard
from pipeline.common.atomic_io import write_json
from pipeline.common.launcher import free_port
from tests.fork_server import ENVIRONMENT, ROOT, Fork

__all__ = ["ENVIRONMENT", "ROOT", "Fork"]

TINY = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def python(*words: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`python WORDS` in the repository root."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        process = Fork([str(word) for word in words], ENVIRONMENT, output, errors)
        process.wait(timeout)
        status = process.returncode
        assert status is not None
        return subprocess.CompletedProcess(words, status, output.read_text(), errors.read_text())


def refuses(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit status 2, one line on standard error that holds all `parts`, no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, result.stderr[-3000:]
    assert len(lines) == 1, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in lines[0], lines[0]


def start_ranks(ranks: int, *words: object, script: str = "pipeline/train.py") -> list[Fork]:
    """`pipeline/train.py WORDS` on ranks of this machine, with the variables that every launcher sets."""
    port = str(free_port())
    processes = []
    logs = Path(tempfile.mkdtemp(prefix="solar-logs-"))
    atexit.register(shutil.rmtree, logs, ignore_errors=True)
    for rank in range(ranks):
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment = {**ENVIRONMENT, **{k: str(v) for k, v in facts.items()}}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        log = logs / f"rank-{rank}"
        processes.append(Fork([script, *map(str, words)], environment, log, log))
    return processes


def run_forked_ranks(ranks: int, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Replace `pipeline.benchmarks.common.run_ranks`, without the imports of new interpreters."""
    processes = start_ranks(ranks, *arguments[1:], script=arguments[0])
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)[-6000:]
    return [json.loads(line) for line in outputs[0].splitlines() if line.startswith("{")]


def train(ranks: int, *words: object, expect: int = 0, timeout: float = 240) -> str:
    """Train to the end on ranks; returns what all of them wrote."""
    processes = start_ranks(ranks, *words)
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [expect] * ranks, "\n".join(outputs)[-6000:]
    return "\n".join(outputs)


def metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the records of the optimizer steps, line by line."""
    return [record for record in _records(directory) if "eval_loss" not in record]


def validations(directory: Path) -> list[dict[str, Any]]:
    """Return the records of the validations, line by line."""
    return [record for record in _records(directory) if "eval_loss" in record]


def _records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> list[float]:
    return [record["loss"] for record in metrics(directory)]


def select_rows(shards: Path, output: Path, rows: slice, times: int = 1) -> Path:
    """Copy some rows of shards, such as for validation. The copy has them `times` times."""
    output.mkdir()
    manifest = json.loads((shards / MANIFEST).read_text())
    manifest["shards"] = [write_shard(output / "shard-00000.parquet", list(ShardSet.open(shards))[rows])] * times
    write_json(output / MANIFEST, manifest)
    return output


def write_recipe(path: Path, shards: Path, tokenizer: Path | None, **changes: Any) -> Path:
    """A small fp32 recipe; `changes` are dotted keys with __ for the dot."""
    tree: dict[str, Any] = {
        "output_dir": str(path.parent / path.stem),
        "seed": 3,
        "model": {"config": dict(TINY), "vocab_multiple": 24},
        "data": {"shards": str(shards), "tokenizer": str(tokenizer) if tokenizer else None},
        "loss": {"alignment_warmup_ratio": 0.0},
        "training": {
            "train_batch_size": 4,
            "max_steps": 5,
            "learning_rate": 0.003,
            "warmup_ratio": 0.2,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,  # five steps are few for the default
            "precision": "fp32",
            "save_steps": 100,
            "export_at_end": False,
        },
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    path.write_text(yaml.safe_dump(tree))
    return path
