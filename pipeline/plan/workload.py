"""Inputs of the planner: recipe, model sizes and average statistics of the data."""

from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from pipeline.config.settings import Config
from pipeline.loss.chunking import BufferSizes
from pipeline.loss.head_choice import HEADS, alignment_group
from pipeline.loss.head_time import BYTES_ONLY, ClusterSpeeds, loss_seconds
from pipeline.loss.settings import ResolvedHead
from pipeline.loss.traffic import Traffic
from pipeline.models.loading import DTYPES
from pipeline.models.packed_attention import resolve_attention
from pipeline.plan.activations import Activations, trace_activations
from pipeline.plan.gathers import GatherSimulation, ZeroSettings, simulate_gathers
from pipeline.plan.model_facts import ModelStats


@dataclass(frozen=True)
class Workload:
    """Average statistics of a packed row, and the number of rows.

    Attributes:
        padded_tokens: tokens per row, including padding.
        tokens: tokens per row, without padding.
        target_tokens: target tokens per row.
        sequences: sequences per row.
        pairs: aligned pairs per row.
        dataset_rows: number of packed rows in the data set.
    """

    padded_tokens: int
    tokens: float
    target_tokens: float
    sequences: float
    pairs: float
    dataset_rows: int

    @classmethod
    def from_manifest(cls, manifest: dict) -> "Workload":
        """Compute the averages from the manifest of packed shards."""
        totals, rows = manifest["totals"], manifest["totals"]["rows"]
        return cls(
            # Assume every row is max_seq_length after padding: micro-batches are padded to the longest row, and packed
            # rows are nearly full.
            padded_tokens=manifest["max_seq_length"],
            tokens=totals["tokens"] / rows,
            target_tokens=totals["supervised_tokens"] / rows,
            sequences=totals["sequences"] / rows,
            pairs=totals["pairs"] / rows,
            dataset_rows=rows,
        )


@dataclass(frozen=True)
class PlannedRun:
    """A recipe with its model, data and number of ranks.

    Attributes:
        gpu: whether the run is on GPUs. The CPU kernels use more memory.
        mask_copies: whether sdpa converts the bool mask of packed rows to a float mask in each layer. All kernels
            except cuDNN attention do.
        leaf_modules: whether the decoder layers are ZeRO-3 leaf modules, as in the trainer.
        speeds: speeds by which `head: auto` chooses.
    """

    config: Config
    stats: ModelStats
    zero: ZeroSettings
    workload: Workload
    ranks: int
    gpu: bool = True
    mask_copies: bool = False
    leaf_modules: bool = True
    speeds: ClusterSpeeds = BYTES_ONLY

    @property
    def micro_batch_size(self) -> int:
        """Packed rows per rank and micro-step."""
        return self.config.training.train_micro_batch_size_per_gpu

    @property
    def sequence_parallel_size(self) -> int:
        """Number of ranks that share a row."""
        return self.config.training.sequence_parallel_size

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row on one rank, including padding."""
        return -(-self.workload.padded_tokens // self.sequence_parallel_size)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens per rank and micro-step, including padding."""
        return self.micro_batch_size * self.row_tokens

    @property
    def target_tokens(self) -> float:
        """Target tokens per rank and micro-step."""
        return self.micro_batch_size * self.workload.target_tokens / self.sequence_parallel_size

    @property
    def precision(self) -> str:
        return self.config.training.precision

    @property
    def element_size(self) -> int:
        """Bytes per weight in forward and backward."""
        return DTYPES[self.precision].itemsize

    @property
    def checkpointing(self) -> bool:
        return self.config.model.activation_checkpointing

    @property
    def gradient_accumulation_steps(self) -> int:
        rows = self.micro_batch_size * self.ranks // self.sequence_parallel_size
        return max(1, self.config.training.train_batch_size // rows)

    @cached_property
    def max_steps(self) -> int:
        t = self.config.training
        return t.max_steps or max(1, round(t.num_train_epochs * self.workload.dataset_rows / t.train_batch_size))

    @cached_property
    def attention(self) -> str:
        """The attention implementation, by name."""
        return resolve_attention(self.config.model.attn_implementation, self.stats.config)

    @cached_property
    def activations(self) -> Activations:
        attention = self.attention
        if attention == "sdpa" and not self.mask_copies:
            attention = "sdpa_shared"
        return trace_activations(
            self.stats.config,
            self.micro_batch_size,
            self.row_tokens,
            self.precision,
            attention,
            self.sequence_parallel_size,
            self.stats.adapter,
        )

    @cached_property
    def gathers(self) -> GatherSimulation:
        return simulate_gathers(self.stats, self.zero, self.checkpointing, self.leaf_modules)

    @cached_property
    def persistent_sizes(self) -> tuple[int, ...]:
        """Sizes of the parameters that every rank keeps whole between steps, including small vocabularies."""
        vocabulary = tuple(size for size in self.stats.vocabulary if size <= self.zero.persistence_threshold)
        return self.gathers.persistent_sizes + vocabulary

    def partition_elements(self, sizes: tuple[int, ...]) -> int:
        """Return the elements in the partition of one rank. Parameters are padded to a multiple of the ranks."""
        return sum(-(-size // self.ranks) for size in sizes)

    @cached_property
    def local_elements(self) -> int:
        """Number of elements of all parameters on one rank."""
        stats = self.stats
        return self.trained_elements + self.partition_elements(stats.frozen_matrices + stats.frozen_vectors)

    @cached_property
    def trained_elements(self) -> int:
        """Number of elements of all trained parameters on one rank."""
        return self.partition_elements(self.stats.matrices + self.stats.vectors)

    @property
    def vocabulary_ranks(self) -> int:
        """Number of consecutive ranks between which head and input embedding are divided."""
        return self.config.vocabulary_ranks(self.ranks, self.zero.hpz)

    @cached_property
    def secondary_sizes(self) -> tuple[int, ...]:
        """Sizes of the parameters that hpZ keeps a second time, divided between the ranks of a node."""
        sizes = chain(*chain(*self.stats.layers), *self.stats.final)
        return tuple(size for size in sizes if self.zero.hpz > 1 and size > self.zero.persistence_threshold)

    @property
    def frozen_head(self) -> bool:
        """Whether head and input embedding have no gradient."""
        return self.stats.adapter.freezes_embeddings

    @cached_property
    def head(self) -> ResolvedHead:
        """The configured head, or the one that `auto` would select."""
        if self.vocabulary_ranks == 1:
            return "vocab_parallel"
        if self.config.loss.head != "auto":
            return self.config.loss.head
        return min(HEADS, key=lambda head: loss_seconds(self._traffic(head), head, self.speeds))

    @cached_property
    def buffer_sizes(self) -> BufferSizes:
        """Sizes that determine how many target tokens fit in the memory budget of the loss."""
        return BufferSizes(
            self.vocabulary_ranks,
            -(-self.stats.vocab_size // self.vocabulary_ranks),
            self.stats.hidden_size,
            self.element_size,
            bool(self.stats.softcap),
            self.gpu,
            self.frozen_head,
        )

    @cached_property
    def chunking(self) -> "Chunking":
        return Chunking.from_run(self, self.head)

    @cached_property
    def loss_traffic(self) -> Traffic:
        """Traffic of the loss in one micro-step."""
        return self._traffic(self.head)

    def _traffic(self, head: ResolvedHead) -> Traffic:
        """Return the traffic of the loss in one micro-step, if it is divided into subchunks for that head."""
        c, sequences = Chunking.from_run(self, head), self.micro_batch_size * self.workload.sequences
        pairs, ranks = self.micro_batch_size * self.workload.pairs, self.vocabulary_ranks
        with_gradient = pairs if "pivot" in self.config.loss.detach else sequences
        single_pivots = c.chunk_sequences <= 1 and "pivot" in self.config.loss.detach
        top_k = self.config.loss.num_selected
        return Traffic(
            ranks=ranks,
            vocab=self.stats.vocab_size,
            hidden=self.stats.hidden_size,
            element_size=self.element_size,
            positions=round(c.target_tokens * ranks),
            padded=round(c.target_tokens),
            subchunks=c.subchunks,
            recomputed=c.recomputed,
            padded_recomputed=round(c.target_tokens) if c.recomputed else 0,
            sequences=round(sequences * ranks),
            requires_grad=round(with_gradient * ranks),
            top_k=None if top_k is None else min(top_k, self.stats.vocab_size),
            frozen_head=self.frozen_head,
            chunks=c.chunks,
            blocks=-(-self.buffer_sizes.shard_rows // self.buffer_sizes.block_rows(self.config.loss)),
            # A chunk of one pivot has no sequence with a gradient; such chunks are assumed to coincide on all ranks.
            inner_products=c.subchunks * (pairs / sequences if single_pivots else 1.0),
            passes=self.config.loss.logit_passes,
            pools_vocabulary=self.config.loss.pools_vocabulary,
        )


@dataclass(frozen=True)
class Chunking:
    """Chunking of one rank's micro-batch by pipeline.loss.chunking, if all alignment groups have the average length.

    Attributes:
        target_tokens: target tokens on the rank.
        subchunk_tokens: target tokens in a full subchunk.
        subchunks: number of subchunks in the micro-batch.
        recomputed: number of subchunks whose logits are computed twice.
        chunks: number of chunks, each of which contains whole alignment groups.
        chunk_sequences: sequences of the rank per chunk.
    """

    target_tokens: float
    subchunk_tokens: float
    subchunks: int
    recomputed: int
    chunks: int
    chunk_sequences: float

    @classmethod
    def from_run(cls, run: PlannedRun, head: ResolvedHead) -> "Chunking":
        """Divide the micro-batch so that a subchunk fits in the memory budget."""
        loss, workload, rows = run.config.loss, run.workload, run.micro_batch_size
        target_tokens, sequences = run.target_tokens, rows * workload.sequences
        budget = run.buffer_sizes.rows_that_fit(loss, head == "vocab_parallel")
        if target_tokens <= budget:
            return cls(target_tokens, target_tokens, 1, 0, 1, sequences)
        examples = max(1.0, sequences - rows * workload.pairs)
        groups = {"all": 1.0, "sequence": sequences, "pair_group": examples}[alignment_group(loss)]
        group_tokens = target_tokens / max(1.0, groups)
        if group_tokens <= budget:
            groups_per_chunk = int(budget / group_tokens)
            chunks = -int(-groups // groups_per_chunk)
            chunk_sequences = groups_per_chunk * sequences / groups
            return cls(target_tokens, groups_per_chunk * group_tokens, chunks, 0, chunks, chunk_sequences)
        chunks = max(1, round(groups))
        subchunks = -int(-group_tokens // budget) * chunks
        return cls(target_tokens, budget, subchunks, subchunks, chunks, sequences / groups)
