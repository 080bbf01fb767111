"""The training loop."""

import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import AgreedError, UserError
from data_prep.shards import write_atomically
from pipeline import checkpoint, dist
from pipeline.config import TrainingSettings
from pipeline.data import MicroBatch, local_totals
from pipeline.ds_config import deepspeed_config
from pipeline.guard.guard import Guard
from pipeline.guard.stop import REQUEUE_EXIT_CODE
from pipeline.loss import LossSettings, SolarLoss, Totals
from pipeline.metrics import Metrics
from pipeline.model import DTYPES, load_model
from pipeline.prepare import Prepared
from pipeline.saving import Saver
from pipeline.universal import convert
from pipeline.zero import ZeroEngine, build_sharded

LOSSES_KEPT = 50  # against which a jump is measured
LOSSES_NEEDED = 20


@dataclass
class TrainState:
    """What a run needs beside weights and loader to go on where it was.

    Attributes:
        step: steps done. num_tokens: real tokens seen. recent_ce: cross entropies of the last steps.
    """

    step: int = 0
    num_tokens: int = 0
    recent_ce: list[float] = field(default_factory=list)


def fit(prepared: Prepared, guard: Guard) -> int:
    """Train to the end, or to the next step boundary after USR1 or TERM. Returns the exit status."""
    config, loader = prepared.config, prepared.loader
    guard.at(0, "loading the model")
    found = find_checkpoint(prepared, guard)
    zero = build_engine(prepared, found)
    state = resume(prepared, zero, found)
    saver = Saver(prepared, zero, state.step)
    first = state.step
    if dist.is_main():
        guard.starts.start(first, prepared.max_steps, dist.world_size())
    metrics = start_metrics(prepared, zero, state)

    while state.step < prepared.max_steps:
        guard.at(state.step + 1, "loading data")
        window = loader.next()
        totals, step_tokens, stopping = agree(window, guard, saver, state.step + 1, zero.device)
        if stopping:
            loader.consumed -= config.training.train_batch_size  # not trained on: the next start takes it
            break
        weight = alignment_weight(config.loss, state.step, prepared.max_steps)
        zero.set_learning_rate(learning_rate(config.training, state.step, prepared.max_steps))
        parts = train_step(zero, window, weight, totals, state, config.training.max_loss_jump)
        state.num_tokens += int(step_tokens)
        figures = record(state, parts, totals, weight, zero, prepared) | {"save_seconds": saver.take_seconds()}
        log(metrics, figures, step_tokens, saver)
        if state.step == first + 1 and dist.is_main():
            guard.starts.first_step(state.step)
        if state.step % config.training.save_steps == 0 or state.step == prepared.max_steps:
            save(prepared, saver, state, guard)

    metrics.close()
    status = 0 if state.step == prepared.max_steps else REQUEUE_EXIT_CODE
    if status:
        save(prepared, saver, state, guard)
    saver.finish()
    if dist.is_main():
        guard.starts.end(state.step, status, guard.stop.seconds_ago())
        if status:
            print(
                f"stopped by {guard.stop.name or 'another rank'} after step {state.step}; start again to go on",
                flush=True,
            )
    return status


Found = tuple[Path, dict[str, Any]]  # a checkpoint and its trainer_state.json


def find_checkpoint(prepared: Prepared, guard: Guard) -> Found | None:
    """The newest whole checkpoint that this run goes on from, made loadable on this number of ranks."""
    output_dir = Path(prepared.config.output_dir)

    def find() -> Found | None:
        path = checkpoint.to_resume(prepared.config)
        if path is None:
            return None
        saved = checkpoint.check_resumable(path, prepared)
        if saved["ranks"] != dist.world_size():
            convert(path, output_dir)
        return path, saved

    # A conversion takes minutes for a large model: more than a watchdog or a collective may allow.
    return dist.long_work_on_main(find, lambda: guard.at(0, "looking for a checkpoint, or converting it"))


def build_engine(prepared: Prepared, found: Found | None = None) -> ZeroEngine:
    """The model under ZeRO-3, from its pretrained or fresh random weights, ready to load the checkpoint found."""
    config = prepared.config
    torch.manual_seed(config.seed)
    other_ranks = found is not None and found[1]["ranks"] != dist.world_size()
    ds = deepspeed_config(config, dist.world_size(), load_universal=other_ranks)
    dtype = DTYPES[config.training.precision]
    model = build_sharded(ds, lambda: load_model(config.model, prepared.model_config, dtype))
    return ZeroEngine(config, ds, model, prepared.vocab_size, len(prepared.languages))


def resume(prepared: Prepared, zero: ZeroEngine, found: Found | None) -> TrainState:
    """Go on from the checkpoint found, if there is one."""
    if found is None:
        return TrainState()
    path, saved = found
    checkpoint.load(path, saved, prepared, zero)
    prepared.loader.load_state(saved["loader"])
    if dist.is_main():
        ranks = "" if saved["ranks"] == dist.world_size() else f", saved by {saved['ranks']} ranks"
        print(f"resumed from {path}{ranks}", flush=True)
    return TrainState(saved["step"], saved["num_tokens"], saved["recent_ce"])


def start_metrics(prepared: Prepared, zero: ZeroEngine, state: TrainState) -> Metrics:
    config = prepared.config
    directory = Path(config.output_dir)
    if dist.is_main():
        write_atomically(directory / "config.yaml", checkpoint.recipe_yaml(config).encode())
    flops_per_token = 6.0 * zero.num_parameters()
    return Metrics(directory, dist.is_main(), state.step, prepared.max_steps, flops_per_token, dist.world_size())


def agree(
    window: list[MicroBatch], guard: Guard, saver: Saver, step: int, device: torch.device
) -> tuple[Totals, float, bool]:
    """What all ranks must know before a step: its totals, its real tokens, and whether any of them must stop.

    Raises:
        AgreedError: a rank could not write its part of a checkpoint.
    """
    mine = local_totals(window)
    tokens = sum(batch.num_tokens for batch in window)
    guard.at(step, "waiting for all ranks to begin")
    begin = time.perf_counter()
    flags = [float(guard.stop.received), *saver.report()]
    sums = dist.sum_over_ranks([mine.tokens, mine.pairs, tokens, *flags], device)
    guard.at(step, "forward, backward and update", waited=time.perf_counter() - begin)
    saver.settle(*sums[4:])
    return Totals(sums[0], sums[1]), sums[2], sums[3] > 0


def train_step(
    zero: ZeroEngine,
    window: list[MicroBatch],
    weight: float,
    totals: Totals,
    state: TrainState,
    max_jump: float | None = None,
) -> list[SolarLoss]:
    """All micro-steps of one optimizer step; stops before the update where loss or gradients are not finite, or the
    loss has jumped.
    """
    parts = []
    for batch in window:
        parts.append(zero.forward_backward(batch, weight, totals))
        if len(parts) == len(window):
            if not all(math.isfinite(float(part.loss.detach())) for part in parts):
                blame("loss", zero, window, weight, totals, state.step + 1)
            check_jump(cross_entropy(parts, totals), state, max_jump)
        if not zero.end_micro_step():
            blame("gradient norm", zero, window, weight, totals, state.step + 1)
    state.step += 1
    state.recent_ce = [*state.recent_ce, cross_entropy(parts, totals)][-LOSSES_KEPT:]
    return parts


def cross_entropy(parts: list[SolarLoss], totals: Totals) -> float:
    """Of the global batch, nats per supervised token."""
    return sum(float(part.ce_sum) for part in parts) / max(totals.tokens, 1)


def blame(what: str, zero: ZeroEngine, window: list[MicroBatch], weight: float, totals: Totals, step: int) -> None:
    """Repeat the step to find the first micro-batches whose own gradients are not finite, and end with their names.

    Raises:
        AgreedError: always.
    """
    culprits: list[str] = []
    for batch in window:
        mine = None
        if not zero.gradients_finite(batch, weight, totals):
            mine = f"{dist.place()}, problems {', '.join(batch.pair_ids)}"
        culprits = [text for text in dist.gather(mine) if text is not None]
        if culprits:
            break
    where = "; ".join(culprits) or "repeating the step gave finite gradients, which speaks for a fault of the hardware"
    raise AgreedError(
        f"step {step}: the {what} is not finite; stopped before the update. {where}. "
        "Lower the learning rate or look at these records"
    )


def check_jump(ce: float, state: TrainState, max_jump: float | None) -> None:
    """Raises UserError where the cross entropy is `max_jump` above the median of the last steps."""
    if max_jump is None or len(state.recent_ce) < LOSSES_NEEDED:
        return
    usual = statistics.median(state.recent_ce)
    if ce > usual + max_jump:
        raise UserError(
            f"step {state.step + 1}: the cross entropy jumped to {ce:.3f} from a median of {usual:.3f} over the last "
            f"{len(state.recent_ce)} steps; stopped before the update. Lower the learning rate, or raise "
            "training.max_loss_jump, and start again from the newest checkpoint"
        )


def learning_rate(t: TrainingSettings, step: int, max_steps: int) -> float:
    """Of optimizer step `step` (from 0): linear warm-up, then constant, linear or half-cosine decay to 0."""
    warmup = round(t.warmup_ratio * max_steps)
    if step < warmup:
        return t.learning_rate * (step + 1) / warmup
    if t.lr_scheduler_type == "constant":
        return t.learning_rate
    done = (step - warmup) / max(1, max_steps - warmup)
    return t.learning_rate * ((1 - done) if t.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def alignment_weight(settings: LossSettings, step: int, max_steps: int) -> float:
    """Of optimizer step `step` (from 0): rises linearly from 0 over the warm-up."""
    warmup = round(settings.alignment_warmup_ratio * max_steps)
    return settings.alignment_weight * min(1.0, step / warmup if warmup else 1.0)


def record(
    state: TrainState,
    parts: list[SolarLoss],
    totals: Totals,
    weight: float,
    zero: ZeroEngine,
    prepared: Prepared,
) -> dict[str, Any]:
    """The figures of the optimizer step just done; alignment is null where the global batch had no pair."""
    pairs = totals.pairs or math.nan
    distance = sum(float(part.distance_sum) for part in parts) / pairs
    cosine = sum(float(part.cosine_sum) for part in parts) / pairs
    figures = {
        "step": state.step,
        "loss": sum(float(part.loss.detach()) for part in parts),
        "ce_loss": cross_entropy(parts, totals),
        "align_loss": distance if totals.pairs else None,
        "align_cos": cosine if totals.pairs else None,
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
        saver.fail(metrics.path, error)


def save(prepared: Prepared, saver: Saver, state: TrainState, guard: Guard) -> None:
    guard.at(state.step, "saving")
    dist.from_main(guard.check_lock)
    saver.begin(asdict(state) | {"loader": prepared.loader.state()})
