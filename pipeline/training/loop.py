"""The training loop."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import layout
from pipeline.checkpoint.reshard import convert_to_universal
from pipeline.checkpoint.resume import check_resumable, find_resumable
from pipeline.checkpoint.resume import load as load_checkpoint
from pipeline.checkpoint.saver import Saver
from pipeline.common import distributed
from pipeline.common.atomic_io import write_atomically
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL
from pipeline.data.micro_batch import MicroBatch, local_normalizers
from pipeline.fault_tolerance.guard import Guard
from pipeline.loss import LossNormalizers, SolarLoss
from pipeline.models.loading import DTYPES, load_model
from pipeline.training.metrics import Metrics
from pipeline.training.nonfinite import blame, check_jump
from pipeline.training.preflight import Prepared
from pipeline.training.schedules import alignment_weight, learning_rate
from pipeline.training.state import TrainState
from pipeline.zero3.ds_config import deepspeed_config
from pipeline.zero3.engine import ZeroEngine, build_sharded

LOSSES_KEPT = 50  # against which a jump is measured


def fit(prepared: Prepared, guard: Guard) -> int:
    """Train to the end, or to the next step boundary after USR1 or TERM. Returns the exit status."""
    config, loader = prepared.config, prepared.loader
    guard.enter_phase(0, "loading the model")
    found = find_checkpoint(prepared, guard)
    zero = build_engine(prepared, found)
    state = resume(prepared, zero, found)
    saver = Saver(config, prepared.identity, prepared.pretrained, zero, state.step)
    first = state.step
    if distributed.is_main_process():
        guard.restarts.record_start(first, prepared.max_steps, distributed.world_size())
    metrics = start_metrics(prepared, zero, state)

    while state.step < prepared.max_steps:
        guard.enter_phase(state.step + 1, "loading data")
        window = loader.next()
        normalizers, step_tokens, stopping = agree(window, guard, saver, state.step + 1, zero.device)
        if stopping:
            loader.consumed -= config.training.train_batch_size  # not trained on: the next start takes it
            break
        weight = alignment_weight(config.loss, state.step, prepared.max_steps)
        zero.set_learning_rate(learning_rate(config.training, state.step, prepared.max_steps))
        parts = train_step(zero, window, weight, normalizers, state, config.training.max_loss_jump)
        state.num_tokens += int(step_tokens)
        figures = record(state, parts, normalizers, weight, zero, prepared) | {"save_seconds": saver.pop_wait_seconds()}
        log(metrics, figures, step_tokens, saver)
        if state.step == first + 1 and distributed.is_main_process():
            guard.restarts.record_first_step(state.step)
        if state.step % config.training.save_steps == 0 or state.step == prepared.max_steps:
            save(prepared, saver, state, guard)

    metrics.close()
    status = 0 if state.step == prepared.max_steps else STOPPED_BY_SIGNAL
    if status:
        save(prepared, saver, state, guard)
    saver.finish()
    if distributed.is_main_process():
        guard.restarts.record_end(state.step, status, guard.stop.seconds_since())
        if status:
            print(
                f"stopped by {guard.stop.name or 'another rank'} after step {state.step}; restart to resume",
                flush=True,
            )
    return status


Found = tuple[Path, dict[str, Any]]  # a checkpoint and its trainer_state.json


def find_checkpoint(prepared: Prepared, guard: Guard) -> Found | None:
    """The newest whole checkpoint that this run goes on from, made loadable on this number of ranks."""
    output_dir = Path(prepared.config.output_dir)

    def find() -> Found | None:
        path = find_resumable(prepared.config)
        if path is None:
            return None
        saved = check_resumable(path, prepared.identity)
        if saved["ranks"] != distributed.world_size():
            convert_to_universal(path, output_dir)
        return path, saved

    # A conversion takes minutes for a large model: more than a watchdog or a collective may allow.
    return distributed.run_long_on_rank0(find, lambda: guard.enter_phase(0, "finding or converting a checkpoint"))


def build_engine(prepared: Prepared, found: Found | None = None) -> ZeroEngine:
    """The model under ZeRO-3, from its pretrained or fresh random weights, ready to load the checkpoint found."""
    config = prepared.config
    torch.manual_seed(config.seed)
    other_ranks = found is not None and found[1]["ranks"] != distributed.world_size()
    ds = deepspeed_config(config, distributed.world_size(), load_universal=other_ranks)
    dtype = DTYPES[config.training.precision]
    model = build_sharded(ds, lambda: load_model(config.model, prepared.model_config, dtype))
    return ZeroEngine(config, ds, model, prepared.vocab_size, len(prepared.languages))


def resume(prepared: Prepared, zero: ZeroEngine, found: Found | None) -> TrainState:
    """Go on from the checkpoint found, if there is one."""
    if found is None:
        return TrainState()
    path, saved = found
    load_checkpoint(path, saved, prepared.config, zero)
    prepared.loader.load_state(saved["loader"])
    if distributed.is_main_process():
        ranks = "" if saved["ranks"] == distributed.world_size() else f", saved by {saved['ranks']} ranks"
        print(f"resumed from {path}{ranks}", flush=True)
    return TrainState(saved["step"], saved["num_tokens"], saved["recent_ce"])


def start_metrics(prepared: Prepared, zero: ZeroEngine, state: TrainState) -> Metrics:
    config = prepared.config
    directory = Path(config.output_dir)
    if distributed.is_main_process():
        write_atomically(directory / "config.yaml", layout.recipe_yaml(config).encode())
    flops_per_token = 6.0 * zero.num_parameters()
    return Metrics(
        directory,
        distributed.is_main_process(),
        state.step,
        prepared.max_steps,
        flops_per_token,
        distributed.world_size(),
    )


def agree(
    window: list[MicroBatch], guard: Guard, saver: Saver, step: int, device: torch.device
) -> tuple[LossNormalizers, float, bool]:
    """What all ranks must know before a step: its totals, its real tokens, and whether any of them must stop.

    Raises:
        AgreedError: a rank could not write its part of a checkpoint.
    """
    mine = local_normalizers(window)
    tokens = sum(batch.num_tokens for batch in window)
    guard.enter_phase(step, "waiting for all ranks to begin")
    begin = time.perf_counter()
    flags = [float(guard.stop.received), *saver.local_status()]
    sums = distributed.all_reduce_sum([mine.tokens, mine.pairs, tokens, *flags], device)
    guard.enter_phase(step, "forward, backward and update", waited=time.perf_counter() - begin)
    saver.advance(*sums[4:])
    return LossNormalizers(sums[0], sums[1]), sums[2], sums[3] > 0


def train_step(
    zero: ZeroEngine,
    window: list[MicroBatch],
    weight: float,
    normalizers: LossNormalizers,
    state: TrainState,
    max_jump: float | None = None,
) -> list[SolarLoss]:
    """All micro-steps of one optimizer step; stops before the update where loss or gradients are not finite, or the
    loss has jumped.
    """
    parts = []
    for batch in window:
        parts.append(zero.forward_backward(batch, weight, normalizers))
        if len(parts) == len(window):
            if not all(math.isfinite(float(part.loss.detach())) for part in parts):
                blame("loss", zero, window, weight, normalizers, state.step + 1)
            check_jump(cross_entropy(parts, normalizers), state, max_jump)
        if not zero.end_micro_step():
            blame("gradient norm", zero, window, weight, normalizers, state.step + 1)
    state.step += 1
    state.recent_ce = [*state.recent_ce, cross_entropy(parts, normalizers)][-LOSSES_KEPT:]
    return parts


def cross_entropy(parts: list[SolarLoss], normalizers: LossNormalizers) -> float:
    """Of the global batch, nats per supervised token."""
    return sum(float(part.ce_sum) for part in parts) / max(normalizers.tokens, 1)


def record(
    state: TrainState,
    parts: list[SolarLoss],
    normalizers: LossNormalizers,
    weight: float,
    zero: ZeroEngine,
    prepared: Prepared,
) -> dict[str, Any]:
    """The figures of the optimizer step just done; alignment is null where the global batch had no pair."""
    pairs = normalizers.pairs or math.nan
    distance = sum(float(part.distance_sum) for part in parts) / pairs
    cosine = sum(float(part.cosine_sum) for part in parts) / pairs
    figures = {
        "step": state.step,
        "loss": sum(float(part.loss.detach()) for part in parts),
        "ce_loss": cross_entropy(parts, normalizers),
        "align_loss": distance if normalizers.pairs else None,
        "align_cos": cosine if normalizers.pairs else None,
        "align_weight": weight,
        "grad_norm": zero.grad_norm(),
        "learning_rate": learning_rate(prepared.config.training, state.step - 1, prepared.max_steps),
        "num_tokens": state.num_tokens,
    }
    sums = torch.stack([part.language_ce for part in parts]).sum(0).tolist()
    counts = torch.stack([part.language_tokens for part in parts]).sum(0).tolist()
    per_language = {f"ce_loss_{lang}": s / n for lang, s, n in zip(prepared.languages, sums, counts, strict=True) if n}
    return figures | per_language


def log(metrics: Metrics, figures: dict[str, Any], step_tokens: float, saver: Saver) -> None:
    """Write a step's figures; where rank 0 cannot, all ranks end together at the next step."""
    try:
        metrics.log(figures, step_tokens)
    except OSError as error:
        saver.record_failure(metrics.path, error)


def save(prepared: Prepared, saver: Saver, state: TrainState, guard: Guard) -> None:
    guard.enter_phase(state.step, "saving")
    distributed.broadcast_from_rank0(guard.check_lock)
    saver.start(asdict(state) | {"loader": prepared.loader.state()})
