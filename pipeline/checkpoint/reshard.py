"""A checkpoint for another number of ranks: DeepSpeed's universal format, made once, beside the checkpoint."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.checkpoint.layout import COMPLETE_MARKER, DEEPSPEED_TAG, universal_copy
from pipeline.common.errors import UserError

WORKERS = 4  # processes of DeepSpeed's converter; each holds the file of one of the former ranks


def convert(path: Path, output_dir: Path) -> None:
    """Make the universal copy of a checkpoint, unless a finished one is there. Rank 0 alone calls this.

    Raises:
        UserError: the converter failed, such as for want of space: it needs up to twice the checkpoint's.
    """
    final = universal_copy(output_dir, path)
    marker = (path / COMPLETE_MARKER).read_bytes()  # holds a random id: a copy of another checkpoint-N does not match
    if (final / COMPLETE_MARKER).is_file() and (final / COMPLETE_MARKER).read_bytes() == marker:
        return
    partial = final.with_name(final.name + ".partial")
    for old in (final, partial):
        shutil.rmtree(old, ignore_errors=True)
    print(f"{path}: converting to DeepSpeed's universal format for another number of ranks", flush=True)
    workers = str(min(WORKERS, os.cpu_count() or 1))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(path / DEEPSPEED_TAG), "--output_folder", str(partial / DEEPSPEED_TAG)]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    # A process of its own: the converter forks, which a process with GPU or communication threads must not.
    result = subprocess.run(command, capture_output=True, text=True, env=_plain_environment())
    if result.returncode != 0:
        shutil.rmtree(partial, ignore_errors=True)
        reason = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise UserError(
            f"{path}: cannot be converted for another number of ranks ({reason}); it needs up to twice its size "
            f"free in {output_dir}; else start on as many ranks as saved it"
        )
    (partial / COMPLETE_MARKER).write_bytes(marker)
    os.replace(partial, final)


def _plain_environment() -> dict[str, str]:
    """Without what makes a process a rank; the converter needs no GPU."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in ranks} | {"DS_ACCELERATOR": "cpu"}
