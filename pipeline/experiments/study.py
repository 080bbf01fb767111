"""One seed of the experiment: pretrain a base, pass the gates, train every arm on the same data, measure.

Everything lands in OUTPUT/seed-S: the base as a Hugging Face directory, and one JSON per model. What is there already
is not done again.
"""

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, replace
from os import devnull
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from data_prep.idf_weights import inverse_document_frequency
from pipeline.common.atomic_io import write_json
from pipeline.common.errors import UserError
from pipeline.experiments.auxiliary_losses import Dictionary, MiddleLayer, shuffle_pairs
from pipeline.experiments.measure import copies_digits, measure
from pipeline.experiments.plan import Arm, Plan
from pipeline.experiments.training import PLAIN, Rows, Run, pack_groups, train
from pipeline.experiments.world import LANGUAGES, LOW, MID, PIVOT, World

COPY_GATE = 0.95  # share of copy exercises with every digit right, in every language, before any arm starts


Record = dict[str, Any]


def pretraining_groups(world: World, number: int) -> list[list[Record]]:
    """Single texts: half solved in the pivot, a fifth in the mid-resource languages, the rest copies in all."""
    chance = random.Random(f"pretraining {world.seed}")
    groups = []
    for i in range(number):
        kind = chance.choices(["pivot", "mid", "copy"], [0.5, 0.2, 0.3])[0]
        code = PIVOT if kind == "pivot" else chance.choice(MID if kind == "mid" else LANGUAGES)
        problem = world.draw(chance, code, "all")
        groups.append([world.record(str(i), code, problem, copied=kind == "copy")])
    return groups


def finetuning_groups(world: World, amount: int, mid_problems: int) -> list[list[Record]]:
    """Pairs: problems in pivot and both mid-resource languages, and `amount` in pivot and each low-resource one."""
    chance = random.Random(f"fine-tuning {world.seed}")
    groups = []
    for code in LOW:  # drawn first, so that a smaller amount is a part of a larger one
        problems = [world.draw(chance, code, "seen") for _ in range(1000)][:amount]
        for i, problem in enumerate(problems):
            groups.append([world.record(f"{code}-{i}", c, problem) for c in (PIVOT, code)])
    for i in range(mid_problems):
        problem = world.draw(chance, PIVOT, "all")
        groups.append([world.record(f"mid-{i}", c, problem) for c in (PIVOT, *MID)])
    return groups


class Study:
    """The runs of one seed."""

    def __init__(self, plan: Plan, seed: int, output: Path) -> None:
        self.plan, self.seed, self.directory = plan, seed, output / f"seed-{seed}"
        self.world = World(seed)
        self.tokenizer: PreTrainedTokenizerBase = self.world.tokenizer()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(self, amounts: Sequence[int], say: Callable[[str], None]) -> None:
        """The models of this seed at these amounts.

        Raises UserError where the base does not pass the gate.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        base = self.directory / "base"
        if not (self.directory / "base.json").is_file():
            begin = time.perf_counter()
            model = self.pretrain()
            model.save_pretrained(base)
            self.tokenizer.save_pretrained(base)
            figures = self.figures(model) | {"copies": self.copies(model)}
            write_json(self.directory / "base.json", figures)
            say(f"seed {self.seed}: base in {time.perf_counter() - begin:.0f} s, copies {figures['copies']}")
        copies = json.loads((self.directory / "base.json").read_text())["copies"]
        worst = min(copies, key=copies.__getitem__)
        if copies[worst] < COPY_GATE:
            raise UserError(
                f"seed {self.seed}: the base copies the digits in {copies[worst]:.1%} of {worst}'s exercises; at least "
                f"{COPY_GATE:.0%} are needed before arms can be compared. Pretrain for more steps"
            )
        for amount in amounts:
            rows = Rows(
                pack_groups(self.tokenizer, finetuning_groups(self.world, amount, self.plan.mid_problems)), LANGUAGES
            )
            for name, arm in self.plan.arms.items():
                path = self.directory / f"{name}-{amount}.json"
                if path.is_file() or (arm.amounts is not None and amount not in arm.amounts):
                    continue
                begin = time.perf_counter()
                figures = self.fine_tune(base, rows, arm)
                write_json(path, {"arm": name, "amount": amount, "seed": self.seed, **figures})
                seconds = time.perf_counter() - begin
                say(
                    f"seed {self.seed} {name:>16} {amount:>4}: low {figures['low']:.3f} (seen {figures['low_seen']:.3f}"
                    f", unseen {figures['low_unseen']:.3f}), mid {figures['mid']:.3f}, pivot {figures['pivot']:.3f}, "
                    f"confusion {figures['confusion']:.3f}, words {figures['word_centred_cosine']:.2f} ({seconds:.0f}s)"
                )

    def pretrain(self) -> PreTrainedModel:
        torch.manual_seed(self.seed)
        size = asdict(self.plan.model)
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
        t = self.plan.pretraining
        groups = pretraining_groups(self.world, t.train_batch_size * (t.max_steps or 0))
        train(model, Rows(pack_groups(self.tokenizer, groups), LANGUAGES), self.pad, Run(t, seed=self.seed))
        return model

    @property
    def pad(self) -> int:
        return int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]

    def fine_tune(self, base: Path, rows: Rows, arm: Arm) -> dict[str, Any]:
        """Train one arm from the base and measure it: the same rows in the same order for all arms."""
        torch.manual_seed(self.seed)
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        model = model.to(self.device)
        run = Run(self.plan.finetuning, arm.loss or PLAIN, self.seed, change=shuffle_pairs if arm.shuffle else None)
        if arm.idf:
            weights = inverse_document_frequency(rows, len(self.tokenizer))  # type: ignore[arg-type]
            run = replace(run, vocabulary_weights=torch.from_numpy(weights).to(self.device))
        middle = None
        if arm.middle:
            middle = MiddleLayer(model, arm.middle, self.plan.model.num_hidden_layers // 2 + 1)
            run = replace(run, term=middle)
        elif arm.dictionary:
            run = replace(run, term=Dictionary(self.world, self.tokenizer, arm.dictionary))
        history = train(model, rows, self.pad, run)
        if middle:
            middle.remove()
        return self.figures(model) | {name: values[-1] for name, values in history.items()}

    def figures(self, model: PreTrainedModel) -> dict[str, Any]:
        with _no_progress_bars():
            return measure(model, self.tokenizer, self.world, self.plan.test_problems)

    def copies(self, model: PreTrainedModel) -> dict[str, float]:
        with _no_progress_bars():
            return copies_digits(model, self.tokenizer, self.world, 100)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    with open(devnull, "w") as nowhere, redirect_stderr(nowhere):
        yield
