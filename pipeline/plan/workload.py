"""What a plan is made for: the run as numbers."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from pipeline.config.settings import Config
from pipeline.loss import LossSettings
from pipeline.loss.softmax import rows_in_budget
from pipeline.loss.traffic import Traffic
from pipeline.models.loading import DTYPES
from pipeline.plan.gathers import Gathers, ZeroSettings, gathers
from pipeline.plan.model_facts import Activations, ModelFacts, activations

ResolvedHead = Literal["vocab_parallel", "gathered"]


@dataclass(frozen=True)
class Workload:
    """A packed row, on average; padding included in `width` alone.

    Attributes:
        width: tokens of a row as computed. tokens, supervised, sequences, pairs: real ones in it.
        rows: of the data set.
    """

    width: int
    tokens: float
    supervised: float
    sequences: float
    pairs: float
    rows: int

    @classmethod
    def of_manifest(cls, manifest: dict) -> "Workload":
        totals, rows = manifest["totals"], manifest["totals"]["rows"]
        mean = {key: totals[key] / rows for key in totals}
        # A micro-batch is padded to its longest row, and packed rows nearly fill the limit.
        return cls(
            manifest["max_seq_length"],
            mean["tokens"],
            mean["supervised_tokens"],
            mean["sequences"],
            mean["pairs"],
            rows,
        )


@dataclass(frozen=True)
class Run:
    """A recipe on a number of ranks.

    Attributes:
        gpu: on GPUs; else on CPUs, whose kernels hold more. mask_copies: sdpa turns the mask of packed rows into
            numbers anew in each layer (all but cuDNN's attention).
    """

    config: Config
    facts: ModelFacts
    zero: ZeroSettings
    work: Workload
    ranks: int
    gpu: bool = True
    mask_copies: bool = False

    @property
    def rows(self) -> int:
        return self.config.training.train_micro_batch_size_per_gpu

    @property
    def precision(self) -> str:
        return self.config.training.precision

    @property
    def element(self) -> int:
        """Bytes of a weight in forward and backward."""
        return DTYPES[self.precision].itemsize

    @property
    def checkpointing(self) -> bool:
        return self.config.model.activation_checkpointing

    @property
    def accumulation(self) -> int:
        return max(1, self.config.training.train_batch_size // (self.rows * self.ranks))

    @cached_property
    def max_steps(self) -> int:
        t = self.config.training
        return t.max_steps or max(1, round(t.num_train_epochs * self.work.rows / t.train_batch_size))

    @cached_property
    def activations(self) -> Activations:
        kind = self.config.model.attn_implementation
        shared_mask = kind == "sdpa" and not self.mask_copies
        return activations(
            self.facts.config, self.rows, self.work.width, self.precision, "sdpa_shared" if shared_mask else kind
        )

    @cached_property
    def gathers(self) -> Gathers:
        return gathers(self.facts, self.zero, self.checkpointing)

    @cached_property
    def persistent(self) -> tuple[int, ...]:
        """Sizes of the parameters that ZeRO-3 keeps whole between steps; a small vocabulary is among them."""
        ends = tuple(size for size in self.facts.vocabulary if size <= self.zero.persistence_threshold)
        return self.gathers.persistent + ends

    def shard(self, sizes: tuple[int, ...]) -> int:
        """Elements of a rank's pieces of parameters; ZeRO-3 pads each to a multiple of the ranks."""
        return sum(-(-size // self.ranks) for size in sizes)

    @cached_property
    def own(self) -> int:
        """Elements of all parameters on one rank."""
        return self.shard(self.facts.matrices + self.facts.vectors)

    @cached_property
    def head(self) -> ResolvedHead:
        """How the loss is divided: the setting, or what `auto` would choose."""
        setting: str = self.config.loss.head
        if setting == "auto":
            setting = "vocab_parallel" if self.loss_traffic.vocab_parallel <= self.loss_traffic.gathered else "gathered"
        return "gathered" if setting == "gathered" and self.ranks > 1 else "vocab_parallel"

    @cached_property
    def chunks(self) -> "Chunks":
        return Chunks.of(self.config.loss, self.facts, self.work, self.rows, self.element, self.gpu)

    @cached_property
    def loss_traffic(self) -> Traffic:
        """Of one micro-step."""
        c, sequences = self.chunks, self.rows * self.work.sequences
        moved = sequences if "pivot" not in self.config.loss.detach else self.rows * self.work.pairs
        return Traffic(
            ranks=self.ranks,
            vocab=self.facts.vocab,
            hidden=self.facts.hidden,
            element_size=self.element,
            positions=round(c.positions * self.ranks),
            padded=round(c.positions),
            pieces=c.pieces,
            recomputed=c.recomputed,
            padded_recomputed=round(c.positions) if c.recomputed else 0,
            sequences=round(sequences * self.ranks),
            moved=round(moved * self.ranks),
        )


@dataclass(frozen=True)
class Chunks:
    """How the supervised positions of one rank's micro-batch are cut (schedule.py), with units of average length.

    Attributes:
        positions: of the rank. rows: of a full piece. pieces: in all; recomputed: those filled twice.
        blocks: of whole units. block_sequences: of the rank's sequences in a block.
    """

    positions: float
    rows: float
    pieces: int
    recomputed: int
    blocks: int
    block_sequences: float

    @classmethod
    def of(cls, loss: LossSettings, facts: ModelFacts, work: Workload, micro: int, element: int, gpu: bool) -> "Chunks":
        positions, sequences = micro * work.supervised, micro * work.sequences
        fit = rows_in_budget(loss, facts.vocab * element, facts.softcap, gpu)
        if positions <= fit:
            return cls(positions, positions, 1, 0, 1, sequences)
        groups = max(1.0, sequences - micro * work.pairs)
        units = 1.0 if loss.distance == "infonce" else sequences if "pivot" in loss.detach else groups
        unit = positions / max(1.0, units)
        if unit <= fit:
            whole = int(fit / unit)
            blocks = -int(-units // whole)
            return cls(positions, whole * unit, blocks, 0, blocks, whole * sequences / units)
        blocks = max(1, round(units))
        pieces = -int(-unit // fit) * blocks
        return cls(positions, fit, pieces, pieces, blocks, sequences / units)
