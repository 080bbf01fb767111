"""Run one seed of an experiment: pretrain a base model, check it, then train and evaluate every variant.

Results are written to OUTPUT/seed-S. Each base model is a Hugging Face directory `base-WORLD` with the metrics in
`base-WORLD.json`. Each fine-tuned model has a file WORLD/VARIANT.json. Models with an existing JSON file are skipped.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, replace
from os import devnull
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from data_prep.idf_weights import count_documents, inverse_document_frequency
from data_prep.records import Record
from pipeline.common.atomic_io import write_json
from pipeline.common.errors import UserError
from pipeline.config.settings import TrainingSettings
from pipeline.experiments.auxiliary_losses import DictionaryLoss, HardTokenLoss, MiddleLayerLoss, shuffle_pairs
from pipeline.experiments.measure import copy_accuracy, measure_model
from pipeline.experiments.plan import ExperimentPlan, Variant
from pipeline.experiments.synthetic_benchmark import (
    LOW,
    MID,
    SYNTHETIC_LANGUAGES,
    SYNTHETIC_PIVOT,
    SyntheticBenchmark,
    Task,
)
from pipeline.experiments.training import InMemoryRows, TrainingJob, pack_groups, run_training_job

MIN_COPY_ACCURACY = 0.95  # sanity check of the base model: fraction of copy tasks answered with all digits correct


def pretraining_groups(benchmark: SyntheticBenchmark, number: int) -> list[list[Record]]:
    """Return `number` groups of one record each.

    One half are solved problems in the pivot, one fifth are solved problems in the mid-resource languages, and the rest
    are copy tasks in all languages.
    """
    rng = random.Random(f"pretraining {benchmark.seed}")
    groups = []
    for i in range(number):
        kind = rng.choices(["pivot", "mid", "copy"], [0.5, 0.2, 0.3])[0]
        lang = SYNTHETIC_PIVOT if kind == "pivot" else rng.choice(MID if kind == "mid" else SYNTHETIC_LANGUAGES)
        problem = benchmark.draw_problem(rng, lang, "all")
        groups.append([benchmark.record(str(i), lang, problem, task="copy" if kind == "copy" else "solve")])
    return groups


def finetuning_groups(
    benchmark: SyntheticBenchmark, amount: int, mid_problems: int, task: Task = "solve"
) -> list[list[Record]]:
    """Return groups of parallel records, pivot first.

    Args:
        benchmark: synthetic benchmark that defines the languages and draws the problems.
        amount: number of (pivot, low-resource language) pairs for each low-resource language.
        mid_problems: number of groups of the pivot and both mid-resource languages.
        task: task of the records. The problems do not depend on it.
    """
    rng = random.Random(f"fine-tuning {benchmark.seed}")
    groups = []
    for lang in LOW:  # always draw 1000, so that larger amounts include smaller ones
        problems = [benchmark.draw_problem(rng, lang, "seen") for _ in range(1000)][:amount]
        for i, problem in enumerate(problems):
            groups.append([benchmark.record(f"{lang}-{i}", each, problem, task) for each in (SYNTHETIC_PIVOT, lang)])
    for i in range(mid_problems):
        problem = benchmark.draw_problem(rng, SYNTHETIC_PIVOT, "all")
        groups.append([benchmark.record(f"mid-{i}", each, problem, task) for each in (SYNTHETIC_PIVOT, *MID)])
    return groups


class Study:
    """The models of one seed in one world.

    Attributes:
        benchmark: the synthetic benchmark.
        tokenizer: its tokenizer.
    """

    def __init__(self, plan: ExperimentPlan, world: str, seed: int, output: Path) -> None:
        self.plan, self.world, self.seed, self.directory = plan, world, seed, output / f"seed-{seed}"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.benchmark = SyntheticBenchmark(seed, plan.worlds[world].benchmark)
        self.tokenizer: PreTrainedTokenizerBase = self.benchmark.build_tokenizer()
        self.pad_token_id = int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]

    def run(self, log: Callable[[str], None]) -> None:
        """Train and evaluate the models that have no results yet. `log` is called with one line per model.

        Raises:
            UserError: the base model fails its sanity check.
        """
        (self.directory / self.world).mkdir(parents=True, exist_ok=True)
        base = self.directory / f"base-{self.plan.base_of(self.world)}"
        if not base.with_suffix(".json").is_file():
            self._make_base(base, log)
        self._check_base(base)
        rows = None
        for name, variant in self.plan.variants_of(self.world).items():
            path = self.directory / self.world / f"{name}.json"
            if path.is_file():
                continue
            rows = rows or self.finetuning_rows()
            start = time.perf_counter()
            metrics = self.fine_tune(base, rows, variant)
            write_json(path, {"arm": name, "world": self.world, "seed": self.seed, **metrics})
            log(self._describe(name, metrics, time.perf_counter() - start))

    def finetuning_rows(self) -> InMemoryRows:
        """Return the packed rows of the fine-tuning data."""
        pairs = self.plan.worlds[self.world].pairs
        groups = finetuning_groups(self.benchmark, pairs, self.plan.mid_problems)
        return InMemoryRows(pack_groups(self.tokenizer, groups), SYNTHETIC_LANGUAGES)

    def _make_base(self, base: Path, log: Callable[[str], None]) -> None:
        """Pretrain, save and evaluate the base model."""
        start = time.perf_counter()
        model = self.pretrain()
        model.save_pretrained(base)
        self.tokenizer.save_pretrained(base)
        metrics = self._measure(model)
        with _no_progress_bars():
            metrics["copies"] = copy_accuracy(model, self.tokenizer, self.benchmark, 100)
        write_json(base.with_suffix(".json"), metrics)
        seconds = time.perf_counter() - start
        log(f"seed {self.seed}: {base.name} in {seconds:.0f} s, copy accuracy {metrics['copies']}")

    def _check_base(self, base: Path) -> None:
        """Raise UserError if the base model does not copy digits in every language."""
        accuracy = json.loads(base.with_suffix(".json").read_text())["copies"]
        worst = min(accuracy, key=accuracy.__getitem__)
        if accuracy[worst] < MIN_COPY_ACCURACY:
            raise UserError(
                f"seed {self.seed}: the base model copies all digits in only {accuracy[worst]:.1%} of the tasks in "
                f"{worst}; a comparison of variants needs at least {MIN_COPY_ACCURACY:.0%}. Pretrain for more steps"
            )

    def _describe(self, name: str, metrics: dict[str, Any], seconds: float) -> str:
        return (
            f"seed {self.seed} {self.world:>14} {name:>16}: low {metrics['low']:.3f} (seen {metrics['low_seen']:.3f}, "
            f"unseen {metrics['low_unseen']:.3f}), mid {metrics['mid']:.3f}, pivot {metrics['pivot']:.3f}, confusion "
            f"{metrics['confusion']:.3f}, word cosine {metrics['word_centred_cosine']:.2f} ({seconds:.0f} s)"
        )

    def pretrain(self) -> PreTrainedModel:
        """Train a base model from random weights."""
        torch.manual_seed(self.seed)
        size = asdict(self.plan.model_of(self.world))
        config = AutoConfig.for_model(
            "qwen3",
            vocab_size=len(self.tokenizer),  # type: ignore[arg-type]
            intermediate_size=3 * size["hidden_size"],
            num_key_value_heads=size["num_attention_heads"],
            head_dim=size["hidden_size"] // size["num_attention_heads"],
            max_position_embeddings=512,
            **size,
        )
        model: Any = AutoModelForCausalLM.from_config(config)
        model = model.to(self.device)
        training = self.plan.pretraining
        groups = pretraining_groups(self.benchmark, training.train_batch_size * (training.max_steps or 0))
        rows = InMemoryRows(pack_groups(self.tokenizer, groups), SYNTHETIC_LANGUAGES)
        run_training_job(model, rows, self.pad_token_id, TrainingJob(training, seed=self.seed))
        return model

    def fine_tune(self, base: Path, rows: InMemoryRows, variant: Variant) -> dict[str, Any]:
        """Train one variant from the base model and return its metrics.

        All variants get the same rows in the same order.
        """
        torch.manual_seed(self.seed)
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        model = model.to(self.device)
        training = self.plan.finetuning_of(self.world)
        if variant.translation_steps:
            self._train_translation(model, replace(training, max_steps=variant.translation_steps))
        job = TrainingJob(training, seed=self.seed)
        if variant.loss:
            job = replace(job, loss=variant.loss)
        if variant.shuffle:
            job = replace(job, transform_batch=shuffle_pairs)
        counts = count_documents(rows, len(self.tokenizer))  # type: ignore[arg-type]
        weights = torch.from_numpy(inverse_document_frequency(*counts)).to(self.device)
        if variant.idf:
            job = replace(job, vocabulary_weights=weights)
        middle = None
        if variant.middle:
            middle = MiddleLayerLoss(model, variant.middle)
            job = replace(job, auxiliary_loss=middle, alternate=variant.middle.alternate)
        elif variant.hard:
            job = replace(job, auxiliary_loss=HardTokenLoss(variant.hard, weights))
        elif variant.dictionary:
            dictionary = DictionaryLoss(self.benchmark, self.tokenizer, variant.dictionary)
            job = replace(job, auxiliary_loss=dictionary)
        history = run_training_job(model, rows, self.pad_token_id, job)
        if middle:
            middle.remove()
        return self._measure(model) | {name: values[-1] for name, values in history.items()}

    def _train_translation(self, model: PreTrainedModel, training: TrainingSettings) -> None:
        """Train the translation of the question of every pair of the fine-tuning data into the pivot."""
        pairs = self.plan.worlds[self.world].pairs
        groups = finetuning_groups(self.benchmark, pairs, self.plan.mid_problems, task="translate")
        translations = [[record] for _, *others in groups for record in others]
        rows = InMemoryRows(pack_groups(self.tokenizer, translations), SYNTHETIC_LANGUAGES)
        run_training_job(model, rows, self.pad_token_id, TrainingJob(training, seed=self.seed))

    def _measure(self, model: PreTrainedModel) -> dict[str, Any]:
        with _no_progress_bars():
            return measure_model(model, self.tokenizer, self.benchmark, self.plan.test_problems)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    with open(devnull, "w") as null, redirect_stderr(null):
        yield
