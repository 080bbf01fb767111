"""Write the results of a small run: metrics, generations, evaluation and representations."""

import json
from decimal import Decimal
from pathlib import Path

import numpy as np

from pipeline.evaluation.accuracy import score_by_language
from pipeline.evaluation.consistency import consistency_metrics
from pipeline.evaluation.dataset import Example
from pipeline.evaluation.details import detail_metrics
from pipeline.representations.metrics import representation_metrics

LANGUAGES = ["en", "de", "sw"]
PROBLEMS = 20


def write_run(path: Path, weight: float, solved: dict[str, int], apart: float) -> Path:
    """Write the output directory of a planted run.

    Args:
        path: the output directory.
        weight: alignment weight in its config.yaml.
        solved: how many of the first problems the run solves, by language.
        apart: distance between the representations of its languages.
    """
    path.mkdir(parents=True)
    keys = [(str(i), lang) for i in range(PROBLEMS) for lang in LANGUAGES]
    rows = [
        {"pair_id": i, "lang": lang, "output": "Die Antwort lautet sieben.", "finished": lang != "sw" or int(i) > 2}
        | {"answer": "7" if int(i) < solved[lang] else "8", "gold": "7", "correct": int(i) < solved[lang]}
        | {"tokens": 9 if lang == "sw" else 7, "answer_type": "number", "read_by": "phrase"}
        for i, lang in keys
    ]
    write_lines(path / "generations.jsonl", rows)
    examples = [Example(i, lang, [], Decimal(7)) for i, lang in keys]
    scores = score_by_language(
        examples, [Decimal(row["answer"]) for row in rows], [row["finished"] for row in rows], "en"
    )
    settings = {"model": f"{path.name}/hf", "data": "test.jsonl", "max_new_tokens": 64, "dtype": "auto"}
    export = {"run": str(path), "step": 40, "checkpoint": "c", "dtype": "bf16", "checkpoints": "..", "newest": True}
    model = {"dtype": "bfloat16", "fingerprint": "f", "export": export if weight else None}
    evaluation = {
        "settings": settings,
        "model": model,
        "versions": {"torch": "9.9.9"},
        **scores,
        **consistency_metrics(rows),
        **detail_metrics(rows),
    }
    (path / "evaluation.json").write_text(json.dumps(evaluation))

    rng = np.random.default_rng(0)
    content = rng.normal(size=(PROBLEMS, 6))
    shifts = apart * np.eye(6)[: len(LANGUAGES)]
    points = np.concatenate([content + 0.5 * rng.normal(size=content.shape) + shift for shift in shifts])
    states = {name: points + i for i, name in enumerate(("layer_0", "layer_1", "final", "soft_tokens"))}
    described = representation_metrics(states, sorted(LANGUAGES), "en", {"layer_1", "final", "soft_tokens"})
    result = {"pivot": "en", "languages": sorted(LANGUAGES), "problems": PROBLEMS, "representations": described}
    result |= {"position": "answer", "other_positions": {}, "pair_ids": [f"p{i}" for i in range(PROBLEMS)]}
    (path / "representations.json").write_text(json.dumps(result))

    steps = [
        {
            "step": i,
            "loss": 3 / i,
            "ce_loss": 3 / i,
            "ce_loss_en": 2 / i,
            "num_tokens": 100 * i,
            "align_cos": 1 - apart / 9,
        }
        for i in range(1, 60)
    ]
    write_lines(path / "metrics.jsonl", steps)
    (path / "config.yaml").write_text(f"output_dir: {path}\nseed: 1\nloss:\n  alignment_weight: {weight}\n")
    return path


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
