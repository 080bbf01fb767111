"""Everything that can be checked before a process group, a GPU or any weight is needed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from data_prep.shards.format import ShardSet
from data_prep.tokenization.tokenizer import fingerprint, load_tokenizer
from pipeline.checkpoint.layout import ModelIdentity
from pipeline.common.atomic_io import ensure_writable
from pipeline.common.errors import UserError
from pipeline.config.settings import Config, TrainingSettings
from pipeline.data.loader import Batches, Loader, row_weights
from pipeline.data.token_table import load_token_table
from pipeline.models.loading import load_model_config, padded_vocab_size


@dataclass(frozen=True)
class Prepared:
    """A checked recipe and what it names, loaded. `vocab_size` is the model's own, `padded_size` what is trained."""

    config: Config
    shards: ShardSet
    tokenizer: PreTrainedTokenizerBase
    model_config: PreTrainedConfig
    vocab_size: int
    padded_size: int
    loader: Loader
    max_steps: int

    @property
    def languages(self) -> list[str]:
        return list(self.shards.manifest["languages"])

    @property
    def identity(self) -> ModelIdentity:
        """What checkpoints record of the model, and compare before a run resumes."""
        return ModelIdentity(self.vocab_size, self.padded_size, self.languages)

    @property
    def pretrained(self) -> dict[str, PreTrainedConfig | PreTrainedTokenizerBase]:
        """Objects saved into checkpoints for export, by folder name."""
        return {"model_config": self.model_config, "tokenizer": self.tokenizer}


def prepare(config: Config, rank: int, ranks: int) -> Prepared:
    """Check a recipe against its shards, tokenizer, model and number of ranks.

    Raises:
        UserError: whatever does not fit, in one line.
    """
    shards = _open_shards(config, check_hashes=rank == 0)
    tokenizer = load_tokenizer(config.data.tokenizer or str(config.model.path))
    recorded = shards.manifest["tokenizer"]
    if fingerprint(tokenizer) != recorded["fingerprint"]:
        raise UserError(
            f"{config.data.tokenizer or config.model.path}: not the tokenizer (or chat template) that packed "
            f"{config.data.shards}; set data.tokenizer to that one or pack again"
        )
    model_config = load_model_config(config.model, len(tokenizer))
    vocab_size = model_config.vocab_size
    padded_size = padded_vocab_size(vocab_size, config.model.vocab_multiple)
    t = config.training
    check_ranks(t, padded_size, ranks)
    for lang in config.data.language_weights:
        if lang not in shards.manifest["languages"]:
            known = ", ".join(shards.manifest["languages"])
            raise UserError(f"data.language_weights: no language {lang!r} in {config.data.shards}, which has {known}")
    ensure_writable(Path(config.output_dir), setting="output_dir")
    loader = Loader(
        shards,
        Batches(t.train_batch_size, t.train_micro_batch_size_per_gpu, rank, ranks),
        config.seed,
        recorded["pad_token_id"],
        load_token_table(config.loss.token_weights, vocab_size, "loss.token_weights"),
        row_weights(shards, config.data.language_weights),
    )
    max_steps = t.max_steps or max(1, round(t.num_train_epochs * len(shards) / t.train_batch_size))
    return Prepared(config, shards, tokenizer, model_config, vocab_size, padded_size, loader, max_steps)


def check_ranks(t: TrainingSettings, padded_size: int, ranks: int) -> None:
    """Raises UserError where a number of ranks does not divide the padded vocabulary, or the batch."""
    if padded_size % ranks:
        sizes = ", ".join(str(n) for n in range(1, 65) if padded_size % n == 0)
        raise UserError(
            f"{ranks} ranks do not divide the padded vocabulary of {padded_size}; use {sizes} ranks, "
            f"or set model.vocab_multiple to a multiple of {ranks}"
        )
    micro = t.train_micro_batch_size_per_gpu
    if t.train_batch_size % (micro * ranks):
        fitting = [n for n in range(1, 1025) if padded_size % n == 0 and t.train_batch_size % (micro * n) == 0]
        raise UserError(
            f"training.train_batch_size {t.train_batch_size} is not a multiple of {ranks} ranks x "
            f"training.train_micro_batch_size_per_gpu {micro}; "
            + (f"use {', '.join(map(str, fitting))} ranks" if fitting else "lower the micro-batch")
        )


def _open_shards(config: Config, check_hashes: bool) -> ShardSet:
    path = Path(config.data.shards)
    if not path.exists():
        how = "make demo" if config.data.shards.startswith("runs/demo") else "python -m data_prep pack"
        raise UserError(f"{path}: no shards; make them with: {how}")
    shards = ShardSet.open(path, check_hashes=check_hashes)
    if len(shards) == 0:
        raise UserError(f"{path}: the shards hold no rows; pack other data")
    return shards


def describe(prepared: Prepared, ranks: int) -> dict[str, Any]:
    """Numbers of a run that need no weights; see dry_run.py for how they are shown."""
    manifest, t = prepared.shards.manifest, prepared.config.training
    entries = manifest["shards"]
    share = t.train_batch_size / len(prepared.shards)
    return {
        "rows": len(prepared.shards),
        "tokens per step": round(sum(e["tokens"] for e in entries) * share),
        "supervised tokens per step": round(sum(e["supervised_tokens"] for e in entries) * share),
        "pairs per step": round(sum(e["pairs"] for e in entries) * share, 1),
        "accumulation steps": t.train_batch_size // (t.train_micro_batch_size_per_gpu * ranks),
        "steps per epoch": round(len(prepared.shards) / t.train_batch_size, 2),
        "steps": prepared.max_steps,
    }
