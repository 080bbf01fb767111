"""Export a checkpoint as a Hugging Face model: `python -m pipeline.export --checkpoint DIR --output HFDIR`.

Tensors are merged from the ranks' partitions one tensor at a time, and at most one output file is held in memory.
Vocabulary padding is removed. `export.json` records the run, the step and the data type.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from data_prep.tokenization.tokenizer import fingerprint, load_tokenizer
from pipeline.checkpoint import layout
from pipeline.checkpoint.export_record import (
    ExportRecord,
    checkpoint_id,
    read_export_record,
    relative_directory,
    write_export_record,
)
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.models.loading import DTYPES, meta_model
from pipeline.models.stop_tokens import stop_token_ids

MAX_FILE_BYTES = 5 * 10**9  # maximum file size, as is usual on the Hugging Face Hub


def export(source: Path, output: Path, dtype: str | None = None, update: bool = False) -> ExportRecord:
    """Write safetensors, config, tokenizer and chat template of a checkpoint to a Hugging Face directory.

    Args:
        source: Checkpoint directory, or the output_dir of a run to export its newest checkpoint.
        output: Directory to create.
        dtype: Data type of the weights, a key of `DTYPES`; None: that of the export to update, or else the precision
            that the run was trained in.
        update: If `output` is an export of the same run, keep it if it is up to date, or else replace it.

    Returns:
        The record of the export.

    Raises:
        UserError: There is no complete checkpoint, or `output` is not empty or cannot be written.
    """
    output = output.resolve()  # replace the target of a symbolic link, not the link
    newest = not (source / layout.COMPLETE_MARKER).is_file()
    if newest:
        source = layout.newest_checkpoint(source) or source
    state = layout.read_state(source)
    recipe = yaml.safe_load((source / "config.yaml").read_text(encoding="utf-8"))
    record = ExportRecord(
        run=recipe["output_dir"],
        step=state["step"],
        checkpoint=checkpoint_id(source),
        dtype=dtype or recipe["training"]["precision"],
        checkpoints=relative_directory(source.parent, output),
        newest=newest,
    )
    if existing := _existing_export(output, record, update):
        record = dataclasses.replace(record, dtype=dtype or existing.dtype)
        if existing == record:
            return record
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from error
    _write_files(source, state, record, partial)
    if output.exists():
        _replace(output, partial)
    else:
        os.replace(partial, output)
    _check_tokenizer(source / "tokenizer", output)
    return record


def _replace(output: Path, partial: Path) -> None:
    """Replace an export. Raises UserError if its directory has files of another origin, such as evaluation results."""
    written = {path.name for path in partial.iterdir()}
    others = [path.name for path in output.iterdir() if path.name not in written and ".safetensors" not in path.name]
    if others:
        shutil.rmtree(partial)
        listed = ", ".join(sorted(others))
        raise UserError(f"{output}: has files that the export did not write ({listed}); move them first")
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(output, old)
    os.replace(partial, output)
    shutil.rmtree(old)


def _existing_export(output: Path, record: ExportRecord, update: bool) -> ExportRecord | None:
    """Return the record of an export that `record` may replace, or None if the directory is missing or empty.

    Raises:
        UserError: The directory may not be replaced.
    """
    if not output.exists() or not any(output.iterdir()):
        return None
    existing = read_export_record(output)
    if not update:
        hint = "; --update replaces an older export of the same run" if existing else ""
        raise UserError(f"{output}: exists and is not empty; give another --output or remove it{hint}")
    if existing is None or existing.checkpoints != record.checkpoints:
        raise UserError(f"{output}: not an export of this run; give another --output or remove it")
    return existing


def _write_files(source: Path, state: dict[str, Any], record: ExportRecord, directory: Path) -> None:
    """Write all files of an export."""
    dtype = DTYPES[record.dtype]
    config = AutoConfig.from_pretrained(source / "model_config")
    config.vocab_size, config.dtype = state["vocab_size"], dtype
    config.save_pretrained(directory)
    shutil.copytree(source / "tokenizer", directory, dirs_exist_ok=True)
    # Inference engines such as vLLM read stop tokens from the generation config. The end-of-turn token of the chat
    # template is one of them, and may differ from the model's own.
    tokenizer = load_tokenizer(source / "tokenizer")
    stop_tokens = stop_token_ids(config.eos_token_id, tokenizer)
    GenerationConfig(eos_token_id=stop_tokens, pad_token_id=tokenizer.pad_token_id).save_pretrained(directory)
    _write_weights(file_tensors(config, _tensors(source, state, dtype)), directory)
    write_export_record(directory, record)


def _tensors(source: Path, state: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, tensor). Vocabulary padding is removed, and a tied head is yielded only once."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):  # DeepSpeed prints its progress
        state_dict = get_fp32_state_dict_from_zero_checkpoint(str(source), tag=layout.DEEPSPEED_TAG, lazy_mode=True)
    for full_name, partitioned in state_dict.items():
        name = full_name.removeprefix("model.")
        if state["tied"] and name == "lm_head.weight":
            continue
        tensor = partitioned.contiguous()  # merges the partitions
        if full_name in state["vocabulary_parameters"]:
            tensor = tensor[: state["vocab_size"]]
        yield name, tensor.to(dtype).contiguous()


def file_tensors(
    config: PreTrainedConfig, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Convert the tensors of a model to those of its files on the Hub, as (name, tensor).

    They differ for some architectures. For example, transformers merges the experts of a layer when it loads a model.

    Args:
        config: the model's configuration.
        tensors: (name, tensor) of the model's parameters.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # code of the model's repository, which has no conversions
        yield from tensors
        return
    model = meta_model(config)
    for name, tensor in tensors:
        for file_name, part in revert_weight_conversion(model, {name: tensor}).items():
            yield file_name, part.contiguous()


def _write_weights(tensors: Iterator[tuple[str, torch.Tensor]], directory: Path) -> None:
    """Write model.safetensors, or several files and an index, with the file names of Hugging Face."""
    files: list[list[str]] = []  # tensor names of each file
    pending: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        if pending:
            save_file(pending, directory / f"part-{len(files)}", metadata={"format": "pt"})
            files.append(list(pending))
            pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and sum(t.numel() * t.element_size() for t in pending.values()) + size > MAX_FILE_BYTES:
            flush()
        pending[name] = tensor
        total += size
    flush()
    if len(files) == 1:
        os.replace(directory / "part-0", directory / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    for i, name in enumerate(names):
        os.replace(directory / f"part-{i}", directory / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {tensor: names[i] for i, file in enumerate(files) for tensor in file},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _check_tokenizer(original: Path, output: Path) -> None:
    """Warn if AutoTokenizer does not load the same tokenizer.

    This happens for model types that have their own tokenizer class.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same = fingerprint(AutoTokenizer.from_pretrained(output)) == fingerprint(load_tokenizer(original))
    if not same:
        print(
            f"warning: {output}: AutoTokenizer uses the tokenizer class of the model type and tokenizes differently; "
            "load it with PreTrainedTokenizerFast.from_pretrained"
        )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.export", description=__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="checkpoint-N, or an output_dir to use its newest checkpoint"
    )
    parser.add_argument("--output", type=Path, required=True, help="Hugging Face directory to create")
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        help="data type of the weights; default: that of the updated export, or the precision of the run",
    )
    parser.add_argument(
        "--update", action="store_true", help="replace an older export of the same run; keep one that is up to date"
    )
    args = parser.parse_args()
    record = export(args.checkpoint, args.output, args.dtype, args.update)
    print(f"{args.output}: step {record.step} of {args.checkpoint} in {record.dtype}")


if __name__ == "__main__":
    exit_cleanly(main)
