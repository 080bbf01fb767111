"""Predict the time of the loss with either head, by which `head: auto` chooses and `pipeline.plan` estimates."""

import math
from dataclasses import dataclass

from .settings import ResolvedHead
from .traffic import Traffic

# Start latency of a collective, in hops. Among 0 to 4, this value fits the measurements of benchmarks.plan best.
LAUNCH_HOPS = 3


@dataclass(frozen=True)
class ClusterSpeeds:
    """Speeds that ranks and their links reach.

    With the defaults, only received bytes take time, so the predicted time is their number.

    Attributes:
        flops: FLOP/s of large matrix products.
        memory: bytes per second that a rank reads or writes.
        node: bytes per second that a rank receives from its node. network: bytes per second from other nodes.
        hop: seconds of one hop of a collective.
        ranks_per_node: number of consecutive ranks that share a node.
    """

    flops: float = math.inf
    memory: float = math.inf
    node: float = 1.0
    network: float = 1.0
    hop: float = 0.0
    ranks_per_node: int = 1

    def transfer_seconds(self, received: float, between_nodes: float, calls: float, hops: float) -> float:
        """Return the time on the slower type of link, plus the latency of starts and hops.

        Args:
            received: bytes that a rank receives.
            between_nodes: those of them that come from other nodes.
            calls: number of collectives.
            hops: number of consecutive messages in all of them.
        """
        seconds = max((received - between_nodes) / self.node, between_nodes / self.network)
        return seconds + (hops + LAUNCH_HOPS * calls) * self.hop


BYTES_ONLY = ClusterSpeeds()


def ring_between_nodes(received: float, ranks: int, per_node: int) -> float:
    """Return the received bytes of collectives on a ring that come from other nodes, averaged over the ranks of a node.

    Ranks of the same node are neighbors, and NCCL builds rings through all network cards of a node.
    """
    return received * (ranks - per_node) / (ranks - 1) / per_node if ranks > per_node else 0.0


def loss_seconds(traffic: Traffic, head: ResolvedHead, speeds: ClusterSpeeds) -> float:
    """Predict the time of the loss of a micro-step: of computation or of communication, whichever takes longer."""
    computation = traffic.flops(head) / speeds.flops + traffic.memory_bytes(head) / speeds.memory
    received, (calls, all_reduces) = traffic.received(head), traffic.collectives(head)
    between_nodes = ring_between_nodes(received, traffic.ranks, speeds.ranks_per_node)
    hops = (traffic.ranks - 1) * (calls + all_reduces)
    return max(computation, speeds.transfer_seconds(received, between_nodes, calls, hops))
