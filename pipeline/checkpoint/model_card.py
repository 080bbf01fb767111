"""Model card (README.md) of an exported model: method, base model, figures, data and settings."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pipeline.checkpoint.export_record import ExportRecord

MODEL_CARD = "README.md"
# Entries of metrics.jsonl that describe the run rather than the model.
NOT_REPORTED = {
    "step",
    "num_tokens",
    "step_seconds",
    "tokens_per_second",
    "mfu",
    "peak_memory_gb",
    "save_seconds",
    "gradient_norms_seconds",
}


def write_model_card(
    directory: Path, record: ExportRecord, recipe: dict[str, Any], state: dict[str, Any], metrics: dict[str, Any]
) -> None:
    """Write README.md with the metadata that the Hugging Face Hub reads.

    Args:
        directory: directory of the exported model.
        record: origin of the export.
        recipe: settings of the run.
        state: trainer_state.json of the checkpoint.
        metrics: the record of the checkpoint's step in metrics.jsonl; empty if there is none.

    Raises:
        OSError: the file cannot be written.
    """
    base = recipe["model"]["path"]
    tags = ["solar-train", "sft" if recipe["loss"]["alignment_weight"] == 0 else "solar"]
    data = ModelCardData(
        base_model=base if base and _is_hub_id(base) else None,
        language=state["languages"],
        library_name="peft" if record.adapter else "transformers",
        pipeline_tag="text-generation",
        tags=tags + (["lora"] if _adapter_name(recipe) else []),
    )
    rows = [(key, value) for key, value in metrics.items() if key not in NOT_REPORTED and value is not None]
    hashes = {key: digest for key, digest in state.get("fingerprints", {}).items() if digest}
    sections = [
        f"# {Path(record.run).name}",
        _method(recipe, record, state),
        *_table(f"Metrics at step {record.step}", ("metric", "value"), [(k, f"{v:.6g}") for k, v in rows]),
        *_table("Content hashes", ("setting", "hash"), [(f"`{k}`", f"`{v}`") for k, v in sorted(hashes.items())]),
        "## Settings",
        f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```",
    ]
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    (directory / MODEL_CARD).write_text(str(card), encoding="utf-8")


def _is_hub_id(name: str) -> bool:
    """Return whether the name of a model is a Hub model ID rather than a directory."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _adapter_name(recipe: dict[str, Any]) -> str:
    """Return LoRA or DoRA, or nothing if all weights are trained."""
    adapter = recipe["model"].get("adapter") or {}
    return "" if adapter.get("r") is None else "DoRA" if adapter["use_dora"] else "LoRA"


def _method(recipe: dict[str, Any], record: ExportRecord, state: dict[str, Any]) -> str:
    """Describe in a few sentences what the model is and how it was trained."""
    loss, training = recipe["loss"], recipe["training"]
    adapter = _adapter_name(recipe)
    start = f"fine-tuned from `{recipe['model']['path']}`" if recipe["model"]["path"] else "trained from random weights"
    if adapter and not record.adapter:
        start += f" with a {adapter} adapter, which is merged into the weights,"
    kind = f"A {adapter} adapter of a" if record.adapter else "A"
    objective = (
        "cross entropy alone"
        if loss["alignment_weight"] == 0
        else "cross entropy and, with weight "
        f"{loss['alignment_weight']:g}, the distance between the mean soft tokens of parallel answers "
        "([SOLAR](https://arxiv.org/abs/2606.26466))"
    )
    return (
        f"{kind} causal language model, {start} by SOLAR-train. It minimizes {objective}. It was trained for "
        f"{record.step} steps of {training['train_batch_size']} packed rows ({state['num_tokens']:,} tokens in total) "
        f"in {training['precision']} on {state['ranks']} ranks. The weights are stored in {record.dtype}."
    )


def _table(title: str, header: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    """Return the lines of a section with a table, or nothing if it has no rows."""
    if not rows:
        return []
    lines = [f"| {' | '.join(header)} |", "|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return [f"## {title}", "\n".join(lines)]
