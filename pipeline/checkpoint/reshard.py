"""Convert a checkpoint to DeepSpeed's universal format, so that a different number of ranks can load it."""

import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from pipeline.checkpoint.export_record import checkpoint_id
from pipeline.checkpoint.layout import COMPLETE_MARKER, DEEPSPEED_TAG, find_damage, universal_path
from pipeline.common.atomic_io import write_json
from pipeline.common.errors import UserError, storage_errors, write_error
from pipeline.zero3.safe_loading import weights_only_loading

WORKERS = 4  # processes of DeepSpeed's converter; each loads the file of one saved rank


def convert_to_universal(path: Path, output_dir: Path) -> None:
    """Write the universal copy of a checkpoint into `output_dir` unless an intact one exists. Call it on rank 0 only.

    Its COMPLETE has the id of the checkpoint and the sizes of its own files, which a power failure can truncate.

    Raises:
        UserError: The converter failed or the copy cannot be written, for example because the disk is full. The
            conversion needs free space of up to twice the checkpoint's size.
    """
    final = universal_path(output_dir, path)
    identity = checkpoint_id(path)  # a random id, which identifies the origin of the copy
    if checkpoint_id(final) == identity != "" and find_damage(final) is None:
        return
    partial = final.with_name(final.name + ".partial")
    for old in (final, partial):
        shutil.rmtree(old, ignore_errors=True)
    print(f"{path}: converting to DeepSpeed's universal format for a different number of ranks", flush=True)
    workers = str(min(WORKERS, os.cpu_count() or 1))
    command = [sys.executable, "-m", __name__]
    command += ["--input_folder", str(path / DEEPSPEED_TAG), "--output_folder", str(partial / DEEPSPEED_TAG)]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    # The converter forks, which is unsafe in a process with GPU or communication threads. Block these signals
    # while it starts, so that it ignores them: some clusters send them to all processes of a job, and only the trainer
    # should act on them.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM))
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment_without_rank()
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    _, errors = process.communicate()
    if process.returncode != 0:
        shutil.rmtree(partial, ignore_errors=True)
        reason = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        raise UserError(
            f"{path}: cannot be converted for a different number of ranks ({reason}); free up to twice its size "
            f"in {output_dir}, or use the number of ranks that saved it"
        )
    with storage_errors(final, write_error):
        _publish(partial, final, identity)


def _publish(partial: Path, final: Path, identity: str) -> None:
    """Add COMPLETE to a converted copy and rename it to its final name. If either fails, the copy is deleted.

    Raises:
        OSError: COMPLETE cannot be written, or the copy cannot be renamed.
    """
    try:
        sizes = {str(file.relative_to(partial)): file.stat().st_size for file in partial.rglob("*") if file.is_file()}
        write_json(partial / COMPLETE_MARKER, {"id": identity, "files": sizes})
        os.replace(partial, final)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _environment_without_rank() -> dict[str, str]:
    """Return the environment without the launcher's variables, and with the CPU as DeepSpeed's accelerator."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {k: v for k, v in os.environ.items() if k not in launcher}
    return environment | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": path}


if __name__ == "__main__":  # the converter in a process of its own
    with weights_only_loading():
        runpy.run_module("deepspeed.checkpoint.ds_to_universal", run_name="__main__", alter_sys=True)
