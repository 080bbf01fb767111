"""The training loop."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.checkpoint import layout
from pipeline.checkpoint.saver import Saver
from pipeline.common import distributed
from pipeline.common.atomic_io import write_atomically
from pipeline.common.errors import storage_errors, write_error
from pipeline.common.exit_codes import STOPPED_BY_SIGNAL
from pipeline.data.micro_batch import MicroBatch, local_normalizers
from pipeline.fault_tolerance.guard import Guard
from pipeline.fault_tolerance.watchdog import WAITING
from pipeline.loss import LossNormalizers, SolarLoss
from pipeline.training import best_metric, schedules
from pipeline.training.gradient_norms import term_gradient_norms
from pipeline.training.metrics import MetricsWriter, cross_entropy, step_metrics
from pipeline.training.nonfinite import check_loss_jump, check_validation, raise_nonfinite
from pipeline.training.preflight import PreparedRun
from pipeline.training.start import find_checkpoint, record_start, resume, setup_engine
from pipeline.training.state import TrainState
from pipeline.training.trackers import Trackers
from pipeline.training.validation import is_due, validate
from pipeline.zero3.engine import ZeroEngine

RECENT_STEPS = 50  # number of recent cross entropies to keep, from which a loss jump is detected


class RunEnd(NamedTuple):
    """How training ended.

    Attributes:
        status: exit status: 0, or 75 after a signal.
        step: number of finished optimizer steps.
        stopped_early: whether early stopping ended it.
    """

    status: int
    step: int
    stopped_early: bool


def train(run: PreparedRun, guard: Guard) -> RunEnd:
    """Train until the last step, early stopping, or the next step boundary after USR1 or TERM.

    A validation also ends at the next micro-step after USR1 or TERM. The restarted run repeats it.
    """
    config, loader = run.config, run.loader
    # Hashing all shards takes minutes if there is much data.
    distributed.run_long_on_rank0(run.check_hashes, lambda: guard.enter_phase(0, "checking the shards"))
    checkpoint = find_checkpoint(run, guard)
    record_start(run, checkpoint, guard)
    guard.enter_phase(0, "loading the model")
    engine = setup_engine(run, checkpoint)
    engine.heartbeat = guard.keep_alive
    state = resume(run, engine, checkpoint)
    saver = Saver(config, run.identity, run.pretrained, engine, asdict(state))
    first_step = state.step
    metrics = start_metrics(run, engine, state)
    stopping = validate_if_due(run, engine, state, guard, saver, metrics)

    while not (stopping or is_finished(run, state)):
        guard.enter_phase(state.step + 1, "loading data")
        micro_batches = loader.next()
        normalizers, num_tokens, stopping = sync_step_state(micro_batches, guard, saver, state.step + 1, engine.device)
        if stopping:
            loader.put_back()
            break
        rates = set_rates(run, engine, state)
        norms = gradient_norms_if_due(run, engine, micro_batches, normalizers, state, guard)
        weight, max_loss_jump = rates["align_weight"], config.training.max_loss_jump
        results = train_step(engine, micro_batches, weight, normalizers, state, max_loss_jump)
        state.num_tokens += int(num_tokens)
        record = step_metrics(state, results, normalizers, run.languages)
        record |= {"grad_norm": engine.grad_norm()} | rates | norms
        log(metrics, record | {"save_seconds": saver.pop_wait_seconds()}, num_tokens, saver)
        if state.step == first_step + 1 and distributed.is_main_process():
            guard.restarts.record_first_step(state.step)
        stopping = validate_if_due(run, engine, state, guard, saver, metrics)
        if state.step % config.training.save_steps == 0 or state.step == run.max_steps:
            save_checkpoint(run, saver, state, guard)

    metrics.close()
    status = finish(run, saver, state, guard, stopping)
    # Last, because W&B waits for its upload, and after a signal Slurm kills the job at the end of its grace time.
    guard.enter_phase(state.step, "closing the experiment trackers")
    metrics.finish_trackers()
    distributed.barrier()  # srun kills ranks that run for a minute longer than the first one that exits
    return status


def set_rates(run: PreparedRun, engine: ZeroEngine, state: TrainState) -> dict[str, float]:
    """Set the learning rates of the next step. Return them and the alignment weight, as metrics."""
    config = run.config
    learning_rate = schedules.learning_rate(config.training, state.step, run.max_steps)
    embedding_learning_rate = schedules.embedding_learning_rate(config.training, state.step, run.max_steps)
    engine.set_learning_rate(learning_rate, embedding_learning_rate)
    weight = schedules.alignment_weight(config.loss, state.step, run.max_steps)
    rates = {"align_weight": weight, "learning_rate": learning_rate}
    return rates if embedding_learning_rate is None else rates | {"embedding_learning_rate": embedding_learning_rate}


def gradient_norms_if_due(
    run: PreparedRun,
    engine: ZeroEngine,
    micro_batches: list[MicroBatch],
    normalizers: LossNormalizers,
    state: TrainState,
    guard: Guard,
) -> dict[str, float | None]:
    """Measure the gradient norms of both loss terms if due in the next step, and the seconds that this takes."""
    step, every = state.step + 1, run.config.training.log_gradients_steps
    if not every or step % every:
        return {}
    guard.enter_phase(step, "measuring gradient norms")
    began = time.perf_counter()
    norms = term_gradient_norms(engine, micro_batches, normalizers)
    guard.enter_phase(step, "forward, backward and update")
    return norms | {"gradient_norms_seconds": round(time.perf_counter() - began, 4)}


def is_finished(run: PreparedRun, state: TrainState) -> bool:
    """Return whether the run has reached its last step or ends early."""
    return state.step >= run.max_steps or best_metric.stops_early(run.config.training, state.validation)


def start_metrics(run: PreparedRun, engine: ZeroEngine, state: TrainState) -> MetricsWriter:
    """Write the recipe to the output directory, open metrics.jsonl and start the experiment trackers.

    Raises:
        UserError: on rank 0, if a file cannot be written.
    """
    directory, is_main, trackers = Path(run.config.output_dir), distributed.is_main_process(), None
    ranks = distributed.world_size()
    with storage_errors(directory, write_error):
        if is_main:
            trackers = Trackers(run.trackers, run.config, state.step)
            write_atomically(directory / "config.yaml", layout.recipe_yaml(run.config).encode())
        return MetricsWriter(directory, is_main, state.step, run.max_steps, engine.flops_per_token(), ranks, trackers)


def sync_step_state(
    micro_batches: list[MicroBatch],
    guard: Guard,
    saver: Saver,
    step: int,
    device: torch.device,
    phase: str = "forward, backward and update",
) -> tuple[LossNormalizers, float, bool]:
    """All-reduce the normalizers, token counts, signals and save status before a step or a validation micro-step.

    Collective: all ranks must call it.

    Returns:
        The loss normalizers of the global batch, its number of tokens without padding, and whether to stop because
        a rank has received a signal.

    Raises:
        AgreedError: a rank failed to write its part of a checkpoint.
    """
    local = local_normalizers(micro_batches)
    num_tokens = sum(batch.num_tokens for batch in micro_batches)
    guard.enter_phase(step, WAITING)
    began = time.perf_counter()
    flags = [float(guard.stop.received), *saver.local_status()]
    sums = distributed.all_reduce_sum([local.tokens, local.pairs, num_tokens, *flags], device)
    guard.enter_phase(step, phase, waited=time.perf_counter() - began)
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
        LossError: the loss or the gradient norm is not finite, or the loss has jumped; the weights are unchanged.
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


def validate_if_due(
    run: PreparedRun, engine: ZeroEngine, state: TrainState, guard: Guard, saver: Saver, metrics: MetricsWriter
) -> bool:
    """Validate if due after this step. Save a checkpoint if the model is the best so far or training stops early.

    After a restart, the checkpoint of this step may exist already. The result is then added to it.

    Collective: all ranks must call it.

    Returns:
        Whether a signal has stopped the validation. Its result is then discarded.

    Raises:
        LossError: the cross entropy of the validation is not finite.
    """
    if run.eval_loader is None or not is_due(run, state):
        return False
    training, validation, began = run.config.training, state.validation, time.perf_counter()

    def synchronize(batch: MicroBatch) -> tuple[LossNormalizers, bool]:
        normalizers, _, stopping = sync_step_state([batch], guard, saver, state.step, engine.device, "validating")
        return normalizers, stopping

    local = validate(engine, run.eval_loader, run.config.loss.alignment_weight, synchronize)
    values = distributed.broadcast_from_rank0(lambda: local)  # ranks must not decide by differently rounded values
    if values is None:
        return True
    validation.step, improved = state.step, False
    record = {"step": state.step} | values | {"eval_seconds": round(time.perf_counter() - began, 4)}
    if training.metric_for_best_model is not None:
        value = values.get(training.metric_for_best_model)
        value = math.nan if value is None else value
        improved = validation.update(state.step, value, best_metric.greater_is_better(training))
        record |= {"best_metric": validation.best_metric, "best_step": validation.best_step}
    try:
        metrics.log_validation(record)
    except OSError as error:
        saver.record_failure(metrics.path, error)
    check_validation(values["eval_ce"], state.step)
    if improved or best_metric.stops_early(training, validation) or saver.saved_step == state.step:
        save_checkpoint(run, saver, state, guard)
    return False


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
    saver.start(asdict(state) | {"loader": run.loader.state_dict()}, state.validation.best_step)


def finish(run: PreparedRun, saver: Saver, state: TrainState, guard: Guard, stopped: bool) -> RunEnd:
    """Save a checkpoint if a signal stopped the run, wait for the last save and its copy, and report the end.

    A signal also ends the wait for the copy. The restarted run repeats it.
    """
    status, when = STOPPED_BY_SIGNAL if stopped else 0, f"after step {state.step}; restart to resume"
    if status:
        saver.stop_copying()
        save_checkpoint(run, saver, state, guard)
    saver.finish()
    if not status and not saver.finish_copies(
        lambda: guard.enter_phase(state.step, "copying the last checkpoint"), lambda: guard.stop.received
    ):
        status, when = STOPPED_BY_SIGNAL, "before the last checkpoint was copied; restart to copy it"
    stopped_early = not status and best_metric.stops_early(run.config.training, state.validation)
    if distributed.is_main_process():
        if stopped_early:
            print(best_metric.early_stopping_message(state), flush=True)
        if status:
            print(f"stopped by {guard.stop.name or 'a signal to another rank'} {when}", flush=True)
    return RunEnd(status, state.step, stopped_early)
