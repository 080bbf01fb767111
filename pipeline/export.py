"""Turn a checkpoint into a Hugging Face model directory: `python -m pipeline.export --checkpoint DIR --output HFDIR`.

Tensors are put together from the ranks' pieces one at a time, so memory holds one output file at most. Vocabulary
padding is cut off.
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

MAX_FILE_BYTES = 5 * 10**9  # as Hugging Face splits


def export(source: Path, output: Path, dtype: str) -> None:
    """Write safetensors, config, tokenizer and chat template of a checkpoint (or of a run's newest) to `output`.

    Raises:
        UserError: no complete checkpoint there, output exists or cannot be written.
    """
    if not (source / layout.COMPLETE_MARKER).is_file() and (found := layout.newest(source)):
        source = found
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
    # Who generates, be it vLLM, finds here where a response ends: a base model's own end is not that of the template.
    tokenizer = load_tokenizer(source / "tokenizer")
    ends = stop_token_ids(config.eos_token_id, tokenizer)
    GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id).save_pretrained(partial)
    _write_weights(_tensors(source, state, DTYPES[dtype]), partial)
    if output.exists():
        output.rmdir()
    os.replace(partial, output)
    _check_tokenizer(source / "tokenizer", output)


def _tensors(source: Path, state: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) by Hugging Face's names, the vocabulary without padding; a tied head is left out."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it prints a page
        lazy = get_fp32_state_dict_from_zero_checkpoint(str(source), tag="zero", lazy_mode=True)
    for full_name, piece in lazy.items():
        name = full_name.removeprefix("model.")
        if state["tied"] and name == "lm_head.weight":
            continue
        tensor = piece.contiguous()
        if full_name in state["vocabulary_parameters"]:
            tensor = tensor[: state["vocab_size"]]
        yield name, tensor.to(dtype).contiguous()


def _write_weights(tensors: Iterator[tuple[str, torch.Tensor]], directory: Path) -> None:
    """model.safetensors, or several files and their index as Hugging Face names them."""
    files: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        if held:
            save_file(held, directory / f"part-{len(files)}", metadata={"format": "pt"})
            files.append(list(held))
            held.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and sum(t.numel() * t.element_size() for t in held.values()) + size > MAX_FILE_BYTES:
            flush()
        held[name] = tensor
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
    """Some families make transformers load its own tokenizer class over the one saved: say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same = fingerprint(AutoTokenizer.from_pretrained(output)) == fingerprint(load_tokenizer(original))
    if not same:
        print(
            f"warning: {output}: AutoTokenizer replaces this tokenizer by its class for the model's family; "
            "load it with PreTrainedTokenizerFast.from_pretrained"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.export", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint-N, or a run for its newest")
    parser.add_argument("--output", type=Path, required=True, help="Hugging Face directory to make")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the weights written")
    args = parser.parse_args()
    export(args.checkpoint, args.output, args.dtype)
    print(f"{args.output}: exported {args.checkpoint}")


if __name__ == "__main__":
    exit_cleanly(main)
