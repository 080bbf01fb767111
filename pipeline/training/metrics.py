"""One line of figures per optimizer step: metrics.jsonl, TensorBoard, and a bar or, in a log, a line now and then.

Rank 0 writes.
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pipeline.common.atomic_io import write_atomically
from pipeline.common.hardware import device_called
from pipeline.training.metrics_reader import METRICS, read_metrics

LOG_SECONDS = 30.0  # between lines where no person watches


def peak_memory_gb() -> float:
    """Of this process so far, in GiB: allocated on its GPU, or resident where it has none."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Metrics:
    """Writes one record per step. On ranks other than 0 it does nothing.

    Args:
        directory: of the run. first_step: steps already done; later lines of an interrupted run are dropped.
        flops_per_token: 6 x parameters, for MFU.
    """

    def __init__(
        self, directory: Path, main: bool, first_step: int, max_steps: int, flops_per_token: float, ranks: int
    ):
        self.main, self.flops_per_token = main, flops_per_token
        device = device_called(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        self.peak = device.flops("bf16") * ranks if device else None  # MFU is null on a device without known peak
        self._last = time.perf_counter()
        self.path = path = directory / METRICS
        if not main:
            return
        keep = [record for record in read_metrics(directory) if record["step"] <= first_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in keep).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        self._board = SummaryWriter(directory / "tensorboard", purge_step=first_step + 1)
        self._max_steps, self._logged = max_steps, 0.0
        self._bar = tqdm(
            total=max_steps,
            initial=first_step,
            unit="step",
            desc="train",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def log(self, record: dict[str, Any], step_tokens: float) -> None:
        """Add rate, MFU and memory to a record and write it. `step_tokens`: real tokens of the step, all ranks."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        rate = step_tokens / seconds
        if not self.main:
            return
        record["step_seconds"] = round(seconds, 4)
        record["tokens_per_second"] = round(rate, 1)
        record["mfu"] = round(rate * self.flops_per_token / self.peak, 4) if self.peak else None
        record["peak_memory_gb"] = round(peak_memory_gb(), 3)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for key, value in record.items():
            if key != "step" and value is not None:
                self._board.add_scalar(f"train/{key}", value, record["step"])
        shown = {k: f"{record[k]:.4f}" for k in ("ce_loss", "align_cos") if record[k] is not None}
        shown["tok/s"] = f"{rate:.0f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if self._bar.disable and (now - self._logged > LOG_SECONDS or record["step"] == self._max_steps):
            self._logged = now
            figures = "  ".join(f"{key} {value}" for key, value in shown.items())
            print(f"step {record['step']}/{self._max_steps}  {figures}", flush=True)

    def close(self) -> None:
        if self.main:
            self._file.close()
            self._board.close()
            self._bar.close()
