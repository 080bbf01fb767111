"""Rows of head and input embedding on this rank, and their gradients.

ZeRO-3 divides a [P, d] parameter into R equal flat partitions, so the partition of rank r is rows [r*P/R, (r+1)*P/R).
If the vocabulary is divided between all ranks, the loss and the embedding lookup use these rows in place.

With hpZ, it is divided between the G ranks of a node, so that the loss only communicates within the node. Rank l of
each node has rows [l*P/G, (l+1)*P/G), which are the partitions of R/G consecutive ranks. Their owners send them once
per optimizer step, and receive the gradients of all nodes.

Shape letters: P padded vocabulary, R ranks, G ranks of a node, N = R/G nodes, p = P/R rows of a partition, d hidden
size.
"""

from dataclasses import fields, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.loss import SolarLoss, Vocabulary, VocabularyShard, vocabulary_range
from pipeline.loss.comm import Group, all_reduce, all_to_all, rank_and_size, sum_partials
from pipeline.models.families import HeadConfig


class NodeExchange:
    """Exchange between the ZeRO-3 partitions of all ranks and the shards of each node.

    Args:
        world: process group of all ranks.
        node: process group of G consecutive ranks.
    """

    def __init__(self, world: dist.ProcessGroup, node: dist.ProcessGroup) -> None:
        self.world, (rank, ranks) = world, rank_and_size(world)
        self.local_rank, size = rank_and_size(node)
        self.nodes = ranks // size
        # Rank q's partition belongs to the shard of local rank q // N.
        everyone = torch.arange(ranks)
        self._owners = everyone // self.nodes == self.local_rank  # of the rows of this rank's shard
        self._users = everyone % size == rank // self.nodes  # of this rank's partition

    def gather(self, partition: Tensor) -> Tensor:
        """Return the [N * p, ...] rows of this rank's shard. `partition`: [p, ...] rows of this rank's partition."""
        sent, received = (len(partition) * ranks for ranks in (self._users, self._owners))
        copies = partition.repeat(self.nodes, *[1] * (partition.dim() - 1))
        return all_to_all(copies, sent.tolist(), received.tolist(), self.world)

    def reduce(self, grad: Tensor) -> Tensor:
        """Return the [p, ...] gradient of this rank's partition, summed over nodes.

        Args:
            grad: [N * p, ...] gradient of this rank's shard.
        """
        sent, received = (len(grad) // self.nodes * ranks for ranks in (self._owners, self._users))
        partials = all_to_all(grad, sent.tolist(), received.tolist(), self.world)
        return sum_partials(partials.view(len(grad), -1), self.nodes).view(-1, *grad.shape[1:])

    def sum_losses(self, loss: SolarLoss) -> SolarLoss:
        """Sum a loss, which is equal on the ranks of a node, over nodes. The result has no autograd graph."""
        values = [getattr(loss, field.name).detach() for field in fields(loss)]
        flat = torch.cat([value.flatten().double() for value in values])
        flat = all_reduce(flat if self.local_rank == 0 else torch.zeros_like(flat), self.world)
        parts = flat.split([value.numel() for value in values])
        sums = [part.view_as(value).to(value.dtype) for part, value in zip(parts, values, strict=True)]
        return SolarLoss(*sums)


class VocabularyShards:
    """Head, input embedding and bias on this rank, with their gradient accumulators in fp32.

    Args:
        parameters: the partitioned parameters: `embedding`, and if present `head` and `bias`.
        head_config: logit scale and soft cap of the LM head.
        vocab_size: number of vocabulary entries. padded_size: P.
        weights: [V] vocabulary weights of the soft tokens, or None.
        group: process group that divides the vocabulary, or None for a single process.
        exchange: exchange between nodes, or None if the group has all ranks.
        device: device of this rank.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        head_config: HeadConfig,
        vocab_size: int,
        padded_size: int,
        weights: Tensor | None,
        group: Group,
        exchange: NodeExchange | None,
        device: torch.device,
    ) -> None:
        self.parameters, self._exchange, self._device = parameters, exchange, device
        rank, ranks = rank_and_size(group)
        self._start, self._end = vocabulary_range(vocab_size, padded_size, rank, ranks)
        self._partition_rows = padded_size // ranks // (exchange.nodes if exchange is not None else 1)
        # `vocabulary` fills in the shards, which change with every update.
        nothing = VocabularyShard(torch.empty(0), 0)
        self._empty = Vocabulary(
            vocab_size,
            nothing,
            nothing,
            logit_scale=head_config.logit_scale,
            softcap=head_config.softcap,
            weights=None if weights is None else weights[self._start : self._end].to(device),
            padded_size=padded_size,
        )
        self._received: dict[str, Tensor] = {}
        self._accumulators = {
            name: torch.zeros(padded_size // ranks, *self._partition(name).shape[1:], device=device)
            for name, parameter in parameters.items()
            if parameter.requires_grad
        }

    def _partition(self, name: str) -> Tensor:
        """Return the [p, ...] rows of the ZeRO-3 partition."""
        parameter = self.parameters[name]
        partition, columns = parameter.ds_tensor, parameter.ds_shape[1:]  # type: ignore[attr-defined]
        if partition.numel() != self._partition_rows * columns.numel():
            expected = f"{self._partition_rows} x {columns.numel()}"
            raise RuntimeError(f"ZeRO-3 partition has {partition.numel()} elements; expected {expected}")
        return partition.detach().to(self._device).view(-1, *columns)

    def _rows(self, name: str) -> Tensor:
        if self._exchange is None:
            return self._partition(name)
        if name not in self._received:
            self._received[name] = self._exchange.gather(self._partition(name))
        return self._received[name]

    def vocabulary(self, with_grad: bool = True) -> Vocabulary:
        """Return the current values of this rank's rows.

        Collective after an update of the weights.

        Args:
            with_grad: whether to include the gradient accumulators.
        """
        rows = self._end - self._start

        def local(name: str) -> tuple[Tensor, Tensor | None]:
            grad = self._accumulators.get(name)
            return self._rows(name)[:rows], grad[:rows] if with_grad and grad is not None else None

        def shard(name: str) -> VocabularyShard:
            weight, grad = local(name)
            return VocabularyShard(weight, self._start, grad)

        embedding = shard("embedding")
        head = shard("head") if "head" in self.parameters else embedding
        bias, bias_grad = local("bias") if "bias" in self.parameters else (None, None)
        return replace(self._empty, head=head, embedding=embedding, bias=bias, bias_grad=bias_grad)

    def weights_changed(self, loaded: bool = False) -> None:
        """Receive the rows of other partitions again before their next use.

        Args:
            loaded: whether frozen weights may have changed, too.
        """
        self._received = {} if loaded else {k: v for k, v in self._received.items() if k not in self._accumulators}

    def gradients(self) -> dict[str, Tensor]:
        """Return the accumulated [p, ...] gradients of this rank's partitions. Collective: all ranks must call it."""
        if self._exchange is None:
            return self._accumulators
        return {name: self._exchange.reduce(grad) for name, grad in self._accumulators.items()}

    def zero_grad(self) -> None:
        """Reset the accumulators."""
        for accumulator in self._accumulators.values():
            accumulator.zero_()

    def sum_losses(self, loss: SolarLoss) -> SolarLoss:
        """Return the loss over all ranks from that of the ranks that divide the vocabulary."""
        return loss if self._exchange is None else self._exchange.sum_losses(loss)
