"""Speeds of a cluster in the units of the loss."""

from pipeline.common.hardware import Device
from pipeline.loss import ClusterSpeeds


def cluster_speeds(device: Device | None, precision: str, ranks_per_node: int) -> ClusterSpeeds:
    """Return the speeds that large products and collectives reach on a device, or only bytes if it is unknown."""
    if device is None:
        return ClusterSpeeds(ranks_per_node=ranks_per_node)
    links = 1e9 * device.link_efficiency
    return ClusterSpeeds(
        flops=device.flops(precision) * device.compute_efficiency,
        memory=device.memory_gb_s * 1e9,
        node=device.node_gb_s * links,
        network=device.network_gb_s * links,
        hop=device.hop_seconds,
        ranks_per_node=ranks_per_node,
    )
