"""Compute the metrics of each optimizer step and write them.

Rank 0 writes metrics.jsonl, passes the metrics to the experiment trackers, and shows a progress bar. If standard error
is not a terminal, it prints a line every 30 seconds instead of the progress bar.
"""

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from pipeline.common.atomic_io import write_atomically
from pipeline.common.distributed import local_device
from pipeline.common.hardware import device_called
from pipeline.loss import LossNormalizers, SolarLoss
from pipeline.training.metrics_reader import METRICS, read_records
from pipeline.training.state import TrainState
from pipeline.training.trackers import Trackers

LOG_SECONDS = 30.0  # interval between lines if there is no progress bar


def cross_entropy(results: list[SolarLoss], normalizers: LossNormalizers) -> float:
    """Return the cross entropy of a global batch, in nats per target token."""
    return sum(float(result.ce_sum) for result in results) / max(normalizers.tokens, 1)


def step_metrics(
    state: TrainState, results: list[SolarLoss], normalizers: LossNormalizers, languages: list[str]
) -> dict[str, Any]:
    """Compute the losses of the last optimizer step, in total and per language.

    The alignment metrics are None if the global batch has no pairs, and those of the soft tokens also without top-k.
    """
    pairs = normalizers.pairs or math.nan
    distance = sum(float(result.distance_sum) for result in results) / pairs
    cosine = sum(float(result.cosine_sum) for result in results) / pairs
    soft_tokens = sum(int(result.soft_token_count) for result in results) or math.nan
    kept_mass = sum(float(result.kept_mass) for result in results) / soft_tokens
    entropy = sum(float(result.soft_token_entropy) for result in results) / soft_tokens
    metrics = {
        "step": state.step,
        "loss": sum(float(result.loss.detach()) for result in results),
        "ce_loss": cross_entropy(results, normalizers),
        "align_loss": distance if normalizers.pairs else None,
        "align_cos": cosine if normalizers.pairs else None,
        "soft_token_kept_mass": None if math.isnan(soft_tokens) else kept_mass,
        "soft_token_entropy": None if math.isnan(soft_tokens) else entropy,
        "num_tokens": state.num_tokens,
    }
    sums = torch.stack([result.language_ce for result in results]).sum(0).tolist()
    counts = torch.stack([result.language_tokens for result in results]).sum(0).tolist()
    return metrics | {f"ce_loss_{lang}": s / n for lang, s, n in zip(languages, sums, counts, strict=True) if n}


def peak_memory_gb() -> float:
    """Return the peak memory of this process in GiB: allocated on the GPU, or resident without a GPU."""
    if local_device().type == "cuda" and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MetricsWriter:
    """Writer of one record per optimizer step or validation. Only the main process writes.

    Args:
        directory: output directory of the run.
        is_main: whether this is rank 0.
        first_step: number of finished steps. Records of later steps, left by an interrupted run, are deleted.
        max_steps: last step of the run.
        flops_per_token: floating-point operations per token for MFU: 6 x parameters.
        ranks: the world size.
        trackers: the experiment trackers, on the main process.
    """

    def __init__(
        self,
        directory: Path,
        is_main: bool,
        first_step: int,
        max_steps: int,
        flops_per_token: float,
        ranks: int,
        trackers: Trackers | None = None,
    ):
        self.is_main, self.flops_per_token, self.trackers = is_main, flops_per_token, trackers
        device = device_called(torch.cuda.get_device_name()) if local_device().type == "cuda" else None
        self.peak_flops = device.flops("bf16") * ranks if device else None  # MFU is null on an unknown device
        self._last = time.perf_counter()
        self.path = path = directory / METRICS
        if not is_main:
            return
        keep = [record for record in read_records(directory) if record["step"] <= first_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in keep).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)
        self._max_steps, self._logged = max_steps, 0.0
        self._bar = tqdm(
            total=max_steps,
            initial=first_step,
            unit="step",
            desc="train",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def log(self, record: dict[str, Any], num_tokens: float) -> None:
        """Add throughput, MFU and memory to a record and write it.

        The step time is the time since the last record, minus the record's `gradient_norms_seconds` if present.

        Args:
            record: metrics of a step, updated in place.
            num_tokens: number of tokens in the step over all ranks, without padding.

        Raises:
            OSError: metrics.jsonl cannot be written.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last - record.get("gradient_norms_seconds", 0.0), now
        rate = num_tokens / seconds
        if not self.is_main:
            return
        record["step_seconds"] = round(seconds, 4)
        record["tokens_per_second"] = round(rate, 1)
        record["mfu"] = round(rate * self.flops_per_token / self.peak_flops, 4) if self.peak_flops else None
        record["peak_memory_gb"] = round(peak_memory_gb(), 3)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self.trackers is not None:
            self.trackers.log(record, record["step"])
        shown = {k: f"{record[k]:.4f}" for k in ("ce_loss", "align_cos") if record[k] is not None}
        shown["tok/s"] = f"{rate:.0f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if self._bar.disable and (now - self._logged > LOG_SECONDS or record["step"] == self._max_steps):
            self._logged = now
            values = "  ".join(f"{key} {value}" for key, value in shown.items())
            print(f"step {record['step']}/{self._max_steps}  {values}", flush=True)

    def log_validation(self, record: dict[str, Any]) -> None:
        """Write the record of a validation, whose time does not count in the throughput of the next step.

        Args:
            record: `step`, and values whose names begin with `eval_` or `best_`.

        Raises:
            OSError: metrics.jsonl cannot be written.
        """
        self._last = time.perf_counter()
        if not self.is_main:
            return
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self.trackers is not None:
            self.trackers.log(record, record["step"])
        shown = {key: record[key] for key in ("eval_loss", "eval_ce", "best_metric") if record.get(key) is not None}
        values = "  ".join(f"{key} {value:.4f}" for key, value in shown.items())
        self._bar.clear()
        print(f"step {record['step']}/{self._max_steps}  {values}", flush=True)

    def close(self) -> None:
        """Close metrics.jsonl and the progress bar."""
        if self.is_main:
            self._file.close()
            self._bar.close()

    def finish_trackers(self) -> None:
        """Close the experiment trackers, which may wait for an upload."""
        if self.trackers is not None:
            self.trackers.finish()
