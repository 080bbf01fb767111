"""Model card (README.md) of an exported model: method, base model, figures, data and settings."""

import re
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
    loss = recipe["loss"]
    method = "sft" if not loss["alignment_weight"] else "solar" if loss["pooling_tokens"] == "soft" else "alignment"
    tags = ["solar-train", method]
    data = ModelCardData(
        base_model=base if base and _is_hub_id(base) else None,
        language=hub_languages(state["languages"]),
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


def hub_languages(codes: list[str]) -> list[str]:
    """Return the ISO 639 codes of languages. The Hub refuses scripts and regions: `eng_Latn`, `zh-Hant`."""
    languages = [re.split("[-_]", code)[0].lower() for code in codes]
    return [code for code in dict.fromkeys(languages) if re.fullmatch("[a-z]{2,3}", code)]


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
    objective = "cross entropy alone"
    if loss["alignment_weight"]:
        objective = f"cross entropy and, with weight {loss['alignment_weight']:g}, {_alignment(loss)}"
    return (
        f"{kind} causal language model, {start} by SOLAR-train. It minimizes {objective}. It was trained for "
        f"{record.step} steps of {training['train_batch_size']} packed rows ({state['num_tokens']:,} tokens in total) "
        f"in {training['precision']} on {state['ranks']} ranks. The weights are stored in {record.dtype}."
    )


def _alignment(loss: dict[str, Any]) -> str:
    """Describe the alignment loss."""
    distance = "a contrastive loss between" if loss["distance"] == "infonce" else "the distance between"
    pooled = {
        "soft": "soft tokens of parallel answers ([SOLAR](https://arxiv.org/abs/2606.26466))",
        "hard": "embeddings of the tokens of parallel answers",
        "hidden_states": "hidden states of a middle layer for parallel answers",
    }[loss["pooling_tokens"]]
    pooling = {"mean": "mean", "last": "last", "weights": "weighted mean"}[loss["pooling"]]
    return f"{distance} the {pooling} {pooled}"


def _table(title: str, header: tuple[str, str], rows: list[tuple[str, str]]) -> list[str]:
    """Return the lines of a section with a table, or nothing if it has no rows."""
    if not rows:
        return []
    lines = [f"| {' | '.join(header)} |", "|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return [f"## {title}", "\n".join(lines)]
