"""Export a checkpoint as a Hugging Face model: `python -m pipeline.export --checkpoint DIR --output HFDIR`.

Tensors are merged from the ranks' partitions one tensor at a time, and at most one output file is held in memory.
Vocabulary padding is removed.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from data_prep.tokenization.tokenizer import fingerprint, load_tokenizer
from pipeline.checkpoint import layout
from pipeline.common.errors import UserError, exit_cleanly
from pipeline.models.loading import DTYPES
from pipeline.models.stop_tokens import stop_token_ids

MAX_FILE_BYTES = 5 * 10**9  # maximum file size, as is usual on the Hugging Face Hub


def export(source: Path, output: Path, dtype: str) -> None:
    """Write safetensors, config, tokenizer and chat template of a checkpoint to a Hugging Face directory.

    Args:
        source: Checkpoint directory, or the output_dir of a run to export its newest checkpoint.
        output: Directory to create.
        dtype: Data type of the weights, a key of `DTYPES`.

    Raises:
        UserError: There is no complete checkpoint, or `output` is not empty or cannot be written.
    """
    if not (source / layout.COMPLETE_MARKER).is_file() and (newest := layout.newest_checkpoint(source)):
        source = newest
    state = layout.read_state(source)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"{output}: exists and is not empty; give another --output or remove it")
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror})") from error

    config = AutoConfig.from_pretrained(source / "model_config")
    config.vocab_size, config.dtype = state["vocab_size"], DTYPES[dtype]
    config.save_pretrained(partial)
    shutil.copytree(source / "tokenizer", partial, dirs_exist_ok=True)
    # Inference engines such as vLLM read stop tokens from the generation config. The end-of-turn token of the chat
    # template is one of them, and may differ from the base model's EOS token.
    tokenizer = load_tokenizer(source / "tokenizer")
    stop_tokens = stop_token_ids(config.eos_token_id, tokenizer)
    GenerationConfig(eos_token_id=stop_tokens, pad_token_id=tokenizer.pad_token_id).save_pretrained(partial)
    _write_weights(_tensors(source, state, DTYPES[dtype]), partial)
    if output.exists():
        output.rmdir()
    os.replace(partial, output)
    _check_tokenizer(source / "tokenizer", output)


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
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="data type of the exported weights")
    args = parser.parse_args()
    export(args.checkpoint, args.output, args.dtype)
    print(f"{args.output}: exported {args.checkpoint}")


if __name__ == "__main__":
    exit_cleanly(main)
