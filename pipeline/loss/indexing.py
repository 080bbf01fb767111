"""Index arithmetic without loops over ranks or sequences, and transfers to the device."""

import torch
from torch import Tensor


def ranges(starts: Tensor, lengths: Tensor, total: int | None = None) -> Tensor:
    """Concatenate the integers [start, start + length) of all ranges.

    Args:
        starts, lengths: [n] int64.
        total: sum of the lengths. Required on a GPU, where computing it would wait for the device.
    """
    total = int(lengths.sum()) if total is None else total
    before = lengths.cumsum(0) - lengths
    offsets = torch.repeat_interleave(starts - before, lengths, output_size=total)
    return offsets + torch.arange(total, device=starts.device)


def bounds(lengths: Tensor) -> Tensor:
    """Return [n + 1]: 0 and the cumulative sums of the [n] lengths."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def upload(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copy host tensors of one dtype to the device in a single transfer, without waiting for the device.

    Returns:
        The tensors on the device, with their original shapes.
    """
    if device.type == "cpu":
        return tensors
    # Only a copy from pinned memory is asynchronous.
    flat = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory().to(device, non_blocking=True)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
