"""Start a run: find its checkpoint, build the engine and load the state."""

import os
from pathlib import Path

import torch

from pipeline.checkpoint.reshard import convert_to_universal
from pipeline.checkpoint.resume import find_verified
from pipeline.checkpoint.resume import load as load_checkpoint
from pipeline.common import distributed
from pipeline.common.errors import storage_errors, write_error
from pipeline.fault_tolerance.guard import Guard
from pipeline.training import best_metric
from pipeline.training.engine_setup import build_engine
from pipeline.training.memory_check import memory_warning
from pipeline.training.preflight import PreparedRun
from pipeline.training.resume_checks import ResumePoint, compare_with_checkpoint
from pipeline.training.state import TrainState
from pipeline.zero3.ds_config import deepspeed_config
from pipeline.zero3.engine import ZeroEngine


def find_checkpoint(run: PreparedRun, guard: Guard) -> ResumePoint | None:
    """Find the newest intact checkpoint, and convert it if it was saved by a different number of ranks.

    Collective: all ranks must call it.

    Raises:
        AgreedError: a checkpoint cannot be read, all are damaged, the run must not resume from the newest intact one,
            or it cannot be converted.
    """

    def heartbeat() -> None:
        guard.enter_phase(0, "checking or converting a checkpoint")

    heartbeat()
    # Verify the checksums before any file is parsed: an altered file must not end the run but lead to an older one.
    path = find_verified(run.config, heartbeat)
    if path is None:
        return None
    checkpoint: ResumePoint = distributed.broadcast_from_rank0(lambda: compare_with_checkpoint(run, path))
    if checkpoint.state["ranks"] != distributed.world_size():
        # This takes minutes for a large model, which is longer than the watchdog or a collective may allow.
        output_dir = Path(run.config.output_dir)
        distributed.run_long_on_rank0(lambda: convert_to_universal(checkpoint.path, output_dir), heartbeat)
    return checkpoint


def record_start(run: PreparedRun, checkpoint: ResumePoint | None, guard: Guard) -> None:
    """Record this start and what has changed since the checkpoint. Collective: all ranks must call it.

    Raises:
        AgreedError: the Slurm job is in a crash loop, or the start cannot be recorded.
    """

    def record() -> None:
        step, changes = (0, {}) if checkpoint is None else (checkpoint.state["step"], checkpoint.record())
        with storage_errors(guard.restarts.path, write_error):
            guard.restarts.record_start(step, run.max_steps, distributed.world_size(), **changes)
        for line in [] if checkpoint is None else checkpoint.notes():
            print(line, flush=True)

    distributed.broadcast_from_rank0(record)


def setup_engine(run: PreparedRun, checkpoint: ResumePoint | None = None) -> ZeroEngine:
    """Build the engine with pretrained or random weights, configured to load `checkpoint` if one is given."""
    config, world_size = run.config, distributed.world_size()
    torch.manual_seed(config.seed)
    other_ranks = checkpoint is not None and checkpoint.state["ranks"] != world_size
    hidden_size = run.model_config.hidden_size
    ds = deepspeed_config(config, world_size, hidden_size, run.max_steps, load_universal=other_ranks)
    if distributed.is_main_process():
        ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        if warning := memory_warning(config, ds, run.model_config, world_size, ranks_per_node):
            print(warning, flush=True)
    engine = build_engine(config, ds, run.model_config, run.vocab_size, len(run.languages))
    if engine.tied and config.loss.soft_token_embeddings == "output" and distributed.is_main_process():
        print("loss.soft_token_embeddings: makes no difference, because head and input embeddings are tied", flush=True)
    return engine


def resume(run: PreparedRun, engine: ZeroEngine, checkpoint: ResumePoint | None) -> TrainState:
    """Load the checkpoint into the engine and the loader, or return a fresh state if there is no checkpoint."""
    manifest = run.eval_shards.manifest if run.eval_shards else None
    criterion = best_metric.criterion(run.config, manifest)
    validation = best_metric.resume(criterion, {} if checkpoint is None else checkpoint.state.get("validation", {}))
    if checkpoint is None:
        return TrainState(validation=validation)
    path, saved = checkpoint.path, checkpoint.state
    load_checkpoint(path, saved, run.config, engine)
    run.loader.load_state_dict(saved["loader"])
    if distributed.is_main_process():
        ranks = "" if saved["ranks"] == distributed.world_size() else f", saved by {saved['ranks']} ranks"
        print(f"resumed from {path}{ranks}", flush=True)
    run_id = {"run_id": saved["run_id"]} if "run_id" in saved else {}  # older versions had none
    return TrainState(saved["step"], saved["num_tokens"], saved["recent_ce"], validation, **run_id)
