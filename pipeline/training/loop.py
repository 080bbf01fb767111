"""The training loop."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import layout
from pipeline.checkpoint.reshard import convert_to_universal
from pipeline.checkpoint.resume import load as load_checkpoint
from pipeline.checkpoint.saver import Saver
from pipeline.common import distributed
from pipeline.common.atomic_io import write_atomically
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL
from pipeline.data.micro_batch import MicroBatch, local_normalizers
from pipeline.fault_tolerance.guard import Guard
from pipeline.loss import LossNormalizers, SolarLoss
from pipeline.training import schedules
from pipeline.training.engine_setup import build_engine
from pipeline.training.gradient_norms import term_gradient_norms
from pipeline.training.metrics import MetricsWriter, cross_entropy, step_metrics
from pipeline.training.nonfinite import check_loss_jump, raise_nonfinite
from pipeline.training.preflight import PreparedRun
from pipeline.training.resume_checks import ResumePoint, find_resume_point
from pipeline.training.state import TrainState
from pipeline.zero3.ds_config import deepspeed_config
from pipeline.zero3.engine import ZeroEngine

RECENT_STEPS = 50  # number of recent cross entropies to keep, from which a loss jump is detected


def train(run: PreparedRun, guard: Guard) -> int:
    """Train until the last step, or until the next step boundary after USR1 or TERM. Return the exit status."""
    config, loader = run.config, run.loader
    guard.enter_phase(0, "loading the model")
    checkpoint = find_checkpoint(run, guard)
    record_start(run, checkpoint, guard)
    engine = setup_engine(run, checkpoint)
    state = resume(run, engine, checkpoint)
    saver = Saver(config, run.identity, run.pretrained, engine, state.step)
    first_step, stopping = state.step, False
    metrics = start_metrics(run, engine, state)

    while state.step < run.max_steps:
        guard.enter_phase(state.step + 1, "loading data")
        micro_batches = loader.next()
        normalizers, num_tokens, stopping = sync_step_state(micro_batches, guard, saver, state.step + 1, engine.device)
        if stopping:
            loader.put_back()
            break
        weight = schedules.alignment_weight(config.loss, state.step, run.max_steps)
        learning_rate = schedules.learning_rate(config.training, state.step, run.max_steps)
        embedding_learning_rate = schedules.embedding_learning_rate(config.training, state.step, run.max_steps)
        engine.set_learning_rate(learning_rate, embedding_learning_rate)
        norms: dict[str, float | None] = {}
        if config.training.log_gradients_steps and (state.step + 1) % config.training.log_gradients_steps == 0:
            guard.enter_phase(state.step + 1, "measuring gradient norms")
            norms = term_gradient_norms(engine, micro_batches, normalizers)
            guard.enter_phase(state.step + 1, "forward, backward and update")
        results = train_step(engine, micro_batches, weight, normalizers, state, config.training.max_loss_jump)
        state.num_tokens += int(num_tokens)
        record = step_metrics(state, results, normalizers, run.languages)
        record |= {"align_weight": weight, "grad_norm": engine.grad_norm(), "learning_rate": learning_rate} | norms
        if embedding_learning_rate is not None:
            record["embedding_learning_rate"] = embedding_learning_rate
        log(metrics, record | {"save_seconds": saver.pop_wait_seconds()}, num_tokens, saver)
        if state.step == first_step + 1 and distributed.is_main_process():
            guard.restarts.record_first_step(state.step)
        if state.step % config.training.save_steps == 0 or state.step == run.max_steps:
            save_checkpoint(run, saver, state, guard)

    metrics.close()
    return finish(run, saver, state, guard, stopping)


def find_checkpoint(run: PreparedRun, guard: Guard) -> ResumePoint | None:
    """Find and check the newest complete checkpoint, and convert it if it was saved by a different number of ranks.

    Collective: all ranks must call it.
    """
    output_dir = Path(run.config.output_dir)

    def find() -> ResumePoint | None:
        checkpoint = find_resume_point(run)
        if checkpoint is not None and checkpoint.state["ranks"] != distributed.world_size():
            convert_to_universal(checkpoint.path, output_dir)
        return checkpoint

    # Converting a large model takes minutes, which is longer than the watchdog or a collective may allow.
    return distributed.run_long_on_rank0(find, lambda: guard.enter_phase(0, "finding or converting a checkpoint"))


def record_start(run: PreparedRun, checkpoint: ResumePoint | None, guard: Guard) -> None:
    """Record this start and what has changed since the checkpoint. Collective: all ranks must call it.

    Raises:
        AgreedError: the Slurm job is in a crash loop.
    """

    def record() -> None:
        step, changes = (0, {}) if checkpoint is None else (checkpoint.state["step"], checkpoint.record())
        guard.restarts.record_start(step, run.max_steps, distributed.world_size(), **changes)
        for line in [] if checkpoint is None else checkpoint.notes():
            print(line, flush=True)

    distributed.broadcast_from_rank0(record)


def setup_engine(run: PreparedRun, checkpoint: ResumePoint | None = None) -> ZeroEngine:
    """Build the engine with pretrained or random weights, configured to load `checkpoint` if one is given."""
    config, world_size = run.config, distributed.world_size()
    torch.manual_seed(config.seed)
    other_ranks = checkpoint is not None and checkpoint.state["ranks"] != world_size
    ds = deepspeed_config(config, world_size, load_universal=other_ranks)
    engine = build_engine(config, ds, run.model_config, run.vocab_size, len(run.languages))
    if engine.tied and config.loss.soft_token_embeddings == "output" and distributed.is_main_process():
        print("loss.soft_token_embeddings: makes no difference, because head and input embeddings are tied", flush=True)
    return engine


def resume(run: PreparedRun, engine: ZeroEngine, checkpoint: ResumePoint | None) -> TrainState:
    """Load the checkpoint into the engine and the loader, or return a fresh state if there is no checkpoint."""
    if checkpoint is None:
        return TrainState()
    path, saved = checkpoint.path, checkpoint.state
    load_checkpoint(path, saved, run.config, engine)
    run.loader.load_state_dict(saved["loader"])
    if distributed.is_main_process():
        ranks = "" if saved["ranks"] == distributed.world_size() else f", saved by {saved['ranks']} ranks"
        print(f"resumed from {path}{ranks}", flush=True)
    return TrainState(saved["step"], saved["num_tokens"], saved["recent_ce"])


def start_metrics(run: PreparedRun, engine: ZeroEngine, state: TrainState) -> MetricsWriter:
    """Write the recipe to the output directory and open metrics.jsonl."""
    directory, is_main = Path(run.config.output_dir), distributed.is_main_process()
    if is_main:
        write_atomically(directory / "config.yaml", layout.recipe_yaml(run.config).encode())
    flops_per_token = 6.0 * engine.num_parameters()
    return MetricsWriter(directory, is_main, state.step, run.max_steps, flops_per_token, distributed.world_size())


def sync_step_state(
    micro_batches: list[MicroBatch], guard: Guard, saver: Saver, step: int, device: torch.device
) -> tuple[LossNormalizers, float, bool]:
    """All-reduce the normalizers, token counts, signals and save status before a step.

    Collective: all ranks must call it.

    Returns:
        The loss normalizers of the global batch, its number of tokens without padding, and whether to stop because
        a rank has received a signal.

    Raises:
        AgreedError: a rank failed to write its part of a checkpoint.
    """
    local = local_normalizers(micro_batches)
    num_tokens = sum(batch.num_tokens for batch in micro_batches)
    guard.enter_phase(step, "waiting for all ranks to begin")
    began = time.perf_counter()
    flags = [float(guard.stop.received), *saver.local_status()]
    sums = distributed.all_reduce_sum([local.tokens, local.pairs, num_tokens, *flags], device)
    guard.enter_phase(step, "forward, backward and update", waited=time.perf_counter() - began)
    saver.advance(*sums[4:])
    return LossNormalizers(sums[0], sums[1]), sums[2], sums[3] > 0


def train_step(
    engine: ZeroEngine,
    micro_batches: list[MicroBatch],
    weight: float,
    normalizers: LossNormalizers,
    state: TrainState,
    max_loss_jump: float | None = None,
) -> list[SolarLoss]:
    """Run all micro-steps of one optimizer step and update the weights. Collective: all ranks must call it.

    Args:
        micro_batches: this rank's micro-batches.
        weight: the alignment weight.
        normalizers: counts over the global batch.
        state: state of the run, updated in place.
        max_loss_jump: see `check_loss_jump`.

    Returns:
        The loss of each micro-step.

    Raises:
        AgreedError: the loss or the gradient norm is not finite; the weights are unchanged.
        UserError: the loss has jumped; the weights are unchanged.
    """
    results: list[SolarLoss] = []
    step = state.step + 1
    micro_batches = engine.exchange_layouts(micro_batches)
    for batch in micro_batches:
        results.append(engine.forward_backward(batch, weight, normalizers))
        if len(results) == len(micro_batches):
            if not all(math.isfinite(float(result.loss.detach())) for result in results):
                raise_nonfinite("loss", engine, micro_batches, weight, normalizers, step)
            check_loss_jump(cross_entropy(results, normalizers), state.recent_ce, step, max_loss_jump)
        if not engine.end_micro_step():
            raise_nonfinite("gradient norm", engine, micro_batches, weight, normalizers, step)
    state.step = step
    state.recent_ce = [*state.recent_ce, cross_entropy(results, normalizers)][-RECENT_STEPS:]
    return results


def log(metrics: MetricsWriter, record: dict[str, Any], num_tokens: float, saver: Saver) -> None:
    """Write the metrics of a step. If rank 0 cannot write, all ranks exit at the next step."""
    try:
        metrics.log(record, num_tokens)
    except OSError as error:
        saver.record_failure(metrics.path, error)


def save_checkpoint(run: PreparedRun, saver: Saver, state: TrainState, guard: Guard) -> None:
    """Start saving a checkpoint."""
    guard.enter_phase(state.step, "saving")
    distributed.broadcast_from_rank0(guard.check_lock)
    saver.start(asdict(state) | {"loader": run.loader.state_dict()})


def finish(run: PreparedRun, saver: Saver, state: TrainState, guard: Guard, stopped: bool) -> int:
    """Save a checkpoint if a signal stopped the run, wait for the last save, and return the exit status."""
    status = STOPPED_BY_SIGNAL if stopped else 0
    if status:
        save_checkpoint(run, saver, state, guard)
    saver.finish()
    if distributed.is_main_process():
        guard.restarts.record_end(state.step, status, guard.stop.seconds_since())
        if status:
            signal = guard.stop.name or "a signal to another rank"
            print(f"stopped by {signal} after step {state.step}; restart to resume", flush=True)
    return status
