"""Compare a run's minimum memory with what the GPU and the host have, before the model is loaded."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from pipeline.common.distributed import local_device
from pipeline.common.memory import available_host_memory
from pipeline.config.settings import Config
from pipeline.models.adapters import adapted_meta_model
from pipeline.models.loading import DTYPES

GIB = 2**30
OPTIMIZER_BYTES = 16  # per parameter: fp32 weights, two Adam moments and fp32 gradients
CHECKPOINT_BYTES = 12  # per parameter: fp32 weights and two Adam moments, copied to host memory by a background save


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that each rank allocates for the whole run. Activations, logits and gathered layers come on top.

    Attributes:
        device: weights and optimizer state on the GPU, or in host memory for CPU ranks.
        offloaded: weights and optimizer state offloaded to host memory.
        copies: copies in host memory for background saves.
    """

    device: int
    offloaded: int
    copies: int


def memory_need(config: Config, ds: dict[str, Any], parameters: int, ranks: int, frozen: int = 0) -> MemoryNeed:
    """Compute the memory of weights, optimizer state and copies for background saves.

    `pipeline.plan` also estimates the temporary memory.

    Args:
        config: the recipe.
        ds: the complete DeepSpeed configuration.
        parameters: number of parameters, including the frozen ones.
        ranks: the world size.
        frozen: number of parameters without gradient and optimizer state.
    """
    local, zero = -(-(parameters - frozen) // ranks), ds["zero_optimization"]
    weights = DTYPES[config.training.precision].itemsize * -(-parameters // ranks)
    optimizer = OPTIMIZER_BYTES * local
    places = {"none": 0, "cpu": 0}
    for size, section in ((weights, "offload_param"), (optimizer, "offload_optimizer")):
        places[zero.get(section, {}).get("device", "none")] += size
    return MemoryNeed(places["none"], places["cpu"], CHECKPOINT_BYTES * local * config.training.save_in_background)


def memory_warning(
    config: Config, ds: dict[str, Any], model_config: PreTrainedConfig, ranks: int, ranks_per_node: int
) -> str | None:
    """Return a one-line warning if the run cannot fit in the memory of this GPU or host, or None.

    Args:
        config: the recipe.
        ds: the complete DeepSpeed configuration.
        model_config: the model's configuration.
        ranks: the world size.
        ranks_per_node: number of ranks that share the memory of this host.
    """
    model = adapted_meta_model(model_config, config.model.adapter)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    free = torch.cuda.mem_get_info()[0] if local_device().type == "cuda" else None
    need = memory_need(config, ds, parameters, ranks, frozen)
    return describe_shortage(need, free, available_host_memory(), ranks, ranks_per_node)


def describe_shortage(need: MemoryNeed, device: int | None, host: int, ranks: int, ranks_per_node: int) -> str | None:
    """Return a one-line warning with what would fit if `need` exceeds what is available, or None.

    Args:
        need: memory of a rank.
        device: free bytes of its GPU; None for CPU ranks.
        host: available bytes of host memory.
        ranks: the world size.
        ranks_per_node: number of ranks that share the host memory.
    """
    if device is not None and need.device > device:
        fitting = -(-ranks * need.device // max(device, 1))
        return (
            f"warning: weights and optimizer state need {need.device / GIB:.1f} GiB on each GPU, which has "
            f"{device / GIB:.1f} GiB free; use at least {fitting} GPUs, or offload them with "
            "--deepspeed ds_configs/zero3_offload.json"
        )
    states = ranks_per_node * (need.offloaded + (need.device if device is None else 0))
    needed = states + ranks_per_node * need.copies
    if needed <= host:
        return None
    advice = "set training.save_in_background to false" if states <= host else "use more nodes or request more memory"
    return (
        f"warning: the {ranks_per_node} ranks of this host need {needed / GIB:.1f} GiB of host memory, of which "
        f"{host / GIB:.1f} GiB are available; {advice}"
    )
