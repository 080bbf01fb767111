"""Run the checks that do not need a process group, a GPU or weights."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from data_prep.records import spelling_error
from data_prep.shards.format import ShardSet
from data_prep.tokenization.tokenizer import load_packed_tokenizer, part_that_differs
from pipeline.checkpoint.layout import ModelIdentity
from pipeline.common import distributed
from pipeline.common.atomic_io import ensure_writable, sha256_file
from pipeline.common.errors import UserError
from pipeline.config.settings import Config, DataSettings, TrainingSettings
from pipeline.data.loader import BatchSplit, Loader
from pipeline.data.mixture import ShardMixture, shard_directories
from pipeline.data.sequential_loader import SequentialLoader
from pipeline.data.token_weights import load_token_weights
from pipeline.models.adapters import adapted_meta_model
from pipeline.models.fingerprint import base_fingerprint
from pipeline.models.loading import load_model_config, max_positions, padded_vocab_size
from pipeline.models.middle_layer import check_layer, check_trained_below
from pipeline.models.multimodal import check_weight_files, load_multimodal_config
from pipeline.models.self_check import check_model
from pipeline.training.best_metric import check_metric, rows_fingerprint
from pipeline.training.rank_checks import check_ranks, check_sequence_parallel
from pipeline.training.trackers import select_trackers


@dataclass(frozen=True)
class PreparedRun:
    """A checked recipe with its loaded shards, tokenizer and model configuration.

    Attributes:
        config: the recipe.
        shards: the packed shards of all sources. tokenizer: the tokenizer they were packed with.
        model_config: the model's configuration.
        vocab_size: the model's own vocabulary size. padded_size: the size that is trained.
        loader: the data loader of this rank.
        max_steps: number of optimizer steps of the run.
        eval_shards: the validation shards, or None. eval_loader: those of this rank.
        trackers: names of the experiment trackers.
    """

    config: Config
    shards: ShardMixture
    tokenizer: PreTrainedTokenizerBase
    model_config: PreTrainedConfig
    vocab_size: int
    padded_size: int
    loader: Loader
    max_steps: int
    trackers: list[str]
    eval_shards: ShardSet | None = None
    eval_loader: SequentialLoader | None = None

    @property
    def languages(self) -> list[str]:
        """Languages of the data. A language's id is its index in this list."""
        return list(self.shards.manifest["languages"])

    @property
    def identity(self) -> ModelIdentity:
        """Properties of the model that are recorded in checkpoints and must match to resume."""
        embedding_group = self.config.training.embedding_learning_rate is not None
        return ModelIdentity(
            self.vocab_size, self.padded_size, self.languages, embedding_group, fingerprints=self.fingerprints
        )

    @cached_property
    def fingerprints(self) -> dict[str, str | None]:
        """Hashes of the content that settings name by path, by setting. None if the setting is not set.

        The tokenizer needs none, because its fingerprint is compared with that of the shards.
        """
        loss = self.config.loss
        weights = {"loss.vocabulary_weights": loss.vocabulary_weights, "loss.token_weights": loss.token_weights}
        base = {}
        if self.config.model.adapter.r is not None and distributed.is_main_process():  # only rank 0 compares them
            base = {"model.path": base_fingerprint(str(self.config.model.path), self.model_config)}
        return base | {
            "data.shards": rows_fingerprint(self.shards.manifest),
            **{key: None if path is None else sha256_file(Path(path)) for key, path in weights.items()},
        }

    def check_hashes(self) -> None:
        """Read all shards and compare their hashes with the manifests. Raises UserError if a file has changed."""
        _ = self.fingerprints  # hashes the base of an adapter, too
        validation = [] if self.eval_shards is None else [self.eval_shards]
        for shards in [*self.shards.sources, *validation]:
            shards.check_hashes()

    @property
    def pretrained(self) -> dict[str, PreTrainedConfig | PreTrainedTokenizerBase]:
        """Objects to store in each checkpoint for export, by folder name."""
        model = self.config.model
        multimodal = load_multimodal_config(model.path, model.trust_remote_code)
        objects = {"model_config": self.model_config, "tokenizer": self.tokenizer}
        return objects if multimodal is None else objects | {"multimodal_config": multimodal}


def prepare_run(config: Config, rank: int, world_size: int) -> PreparedRun:
    """Check a recipe against its shards, tokenizer, model and number of ranks, and return what training needs.

    All ranks check the same, so that they all fail with the same error. `PreparedRun.check_hashes` reads all data and
    is called later, on one rank.

    Raises:
        UserError: the recipe is inconsistent with one of them.
    """
    trackers = select_trackers(config.training.report_to)
    shards = ShardMixture([_open_shards(path) for path in shard_directories(config.data.shards)])
    name = config.data.tokenizer or str(config.model.path)
    tokenizer = load_packed_tokenizer(name, shards.sources[0].path, shards.manifest)
    _check_same_tokenizer(tokenizer, shards.sources)
    model_config = load_model_config(config.model, len(tokenizer))
    _check_model(config, model_config, rank)
    vocab_size = model_config.vocab_size
    padded_size = padded_vocab_size(vocab_size, config.model.vocab_multiple)
    training = config.training
    check_ranks(training, padded_size, world_size)
    _check_languages(config, shards.manifest)
    _check_sequence_lengths(shards.sources, model_config)
    eval_shards = _open_eval_shards(config, shards, tokenizer, model_config)
    _check_tokens([*shards.sources, *filter(None, [eval_shards])], len(tokenizer), vocab_size, rank)
    ensure_writable(Path(config.output_dir), setting="output_dir")
    split = BatchSplit(
        training.train_batch_size,
        training.train_micro_batch_size_per_gpu,
        rank,
        world_size,
        training.sequence_parallel_size,
    )
    pad_token_id = shards.manifest["tokenizer"]["pad_token_id"]
    token_weights = load_token_weights(config.loss.token_weights, vocab_size, "loss.token_weights")
    load_token_weights(config.loss.vocabulary_weights, vocab_size, "loss.vocabulary_weights")  # checks; used later
    sampling_weights = shards.sampling_weights(config.data.source_weights, config.data.language_weights)
    loader = Loader(shards, split, config.seed, pad_token_id, token_weights, sampling_weights)
    eval_loader = None
    if eval_shards is not None:
        eval_loader = SequentialLoader(eval_shards, loader.languages, split, pad_token_id, token_weights)
    max_steps = count_steps(training, len(shards))
    return PreparedRun(
        config=config,
        shards=shards,
        tokenizer=tokenizer,
        model_config=model_config,
        vocab_size=vocab_size,
        padded_size=padded_size,
        loader=loader,
        max_steps=max_steps,
        trackers=trackers,
        eval_shards=eval_shards,
        eval_loader=eval_loader,
    )


def _check_model(config: Config, model_config: PreTrainedConfig, rank: int) -> None:
    """Raise UserError if the model does not fit the recipe. Rank 0 also checks the family, which takes longer."""
    check_sequence_parallel(config, model_config)
    check_layer(config.loss, model_config)
    if rank == 0:
        check_weight_files(config.model.path, config.model.trust_remote_code)
        if config.model.adapter.r is not None:
            model = adapted_meta_model(model_config, config.model.adapter)  # checks target_modules
            check_trained_below(config.loss, model)
        check_model(model_config, config.model, config.training.sequence_parallel_size)


def _check_tokens(sources: Sequence[ShardSet], tokenizer_size: int, vocab_size: int, rank: int) -> None:
    """Check that the model has all tokens of the data. Some models lack the last ones of their tokenizer.

    For those, rank 0 reads all tokens.

    Raises:
        UserError: it lacks one.
    """
    if rank != 0 or tokenizer_size <= vocab_size:
        return
    for source in sources:
        largest = max(source.largest_token(), source.manifest["tokenizer"]["pad_token_id"])
        if largest >= vocab_size:
            raise UserError(
                f"{source.path}: uses the token id {largest}, but the model's vocab_size is {vocab_size}; use the "
                "model's own tokenizer"
            )


def count_steps(training: TrainingSettings, num_rows: int) -> int:
    """Return the number of optimizer steps of a run on `num_rows` rows."""
    return training.max_steps or max(1, round(training.num_train_epochs * num_rows / training.train_batch_size))


def _open_shards(path: Path) -> ShardSet:
    if not path.exists():
        raise UserError(f"{path}: no shards; create them with: {_pack_command(str(path))}")
    shards = ShardSet.open(path, check_hashes=False)
    if len(shards) == 0:
        raise UserError(f"{path}: the shards contain no rows; pack different data")
    return shards


def _pack_command(shards: str) -> str:
    """Return the command that creates shards, in a Slurm job or on one machine."""
    demo = [Path(shards)] == shard_directories(DataSettings().shards)
    if "SLURM_JOB_ID" in os.environ:
        return "sbatch slurm/prepare.sh" if demo else f"INPUT=... TOKENIZER=... SHARDS={shards} sbatch slurm/prepare.sh"
    return "make demo" if demo else f"python -m data_prep pack --output {shards} ..."


def _check_languages(config: Config, manifest: dict[str, Any]) -> None:
    """Check that the weighted languages are in the data, and that there is something to align.

    Raises:
        UserError: a language is missing or spelled in two ways, or the alignment loss has no pairs.
    """
    names = ", ".join(map(str, shard_directories(config.data.shards)))
    if error := spelling_error(manifest["languages"]):
        raise UserError(f"{names}: {error}, and pack again")
    for lang in config.data.language_weights:
        if lang not in manifest["languages"]:
            known = ", ".join(manifest["languages"])
            raise UserError(f"data.language_weights: no language {lang!r} in {names}, which has {known}")
    if config.loss.alignment_weight > 0 and manifest["totals"]["pairs"] == 0:
        raise UserError(
            f"{names}: has no translations of pivots, so nothing can be aligned; pack translations with "
            "their pivots, or set loss.alignment_weight to 0 for plain fine-tuning"
        )


def _check_same_tokenizer(tokenizer: PreTrainedTokenizerBase, sources: Sequence[ShardSet]) -> None:
    """Check that all sources were packed with the tokenizer and chat template of the first one.

    Raises:
        UserError: a source was not.
    """
    for source in sources[1:]:
        if part := part_that_differs(tokenizer, source.manifest):
            raise UserError(
                f"{source.path}: packed with a {part} that differs from that of {sources[0].path}; pack one of them "
                "again"
            )


def _open_eval_shards(
    config: Config, training: ShardMixture, tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig
) -> ShardSet | None:
    """Open the validation shards, if there are any, and check that they match the training shards, metric and model.

    Raises:
        UserError: they have another tokenizer or chat template, a pivot that no source has, a language that is not in
            the training data, no such metric, or a sequence that is too long.
    """
    if config.data.eval_shards is None:
        return None
    shards = _open_shards(Path(config.data.eval_shards))
    manifest = shards.manifest
    different = part_that_differs(tokenizer, manifest)
    if different is None and manifest["pivot"] not in [source.manifest["pivot"] for source in training.sources]:
        different = "pivot language"
    if different:
        raise UserError(
            f"data.eval_shards: {shards.path}: packed with another {different} than {config.data.shards}; pack again "
            "with the same one"
        )
    if missing := [lang for lang in manifest["languages"] if lang not in training.manifest["languages"]]:
        raise UserError(
            f"data.eval_shards: {shards.path}: has languages that {config.data.shards} lacks: {', '.join(missing)}; "
            "pack again without them"
        )
    check_metric(config.training.metric_for_best_model, str(shards.path), manifest)
    _check_sequence_lengths([shards], model_config)
    return shards


def _check_sequence_lengths(sources: Sequence[ShardSet], config: PreTrainedConfig) -> None:
    """Check that no sequence is longer than the model's positions. Positions restart in every sequence of a row.

    Raises:
        UserError: a sequence is longer.
    """
    limit = max_positions(config)
    for source in sources:
        if limit is None or source.manifest["max_seq_length"] <= limit:
            continue
        longest = source.longest_sequence()
        if longest > limit:
            raise UserError(
                f"{source.path}: its longest sequence has {longest} tokens, but the model has {limit} positions "
                f"(max_position_embeddings); pack again with --max_seq_length {limit}"
            )
