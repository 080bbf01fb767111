"""Track the memory and the memory traffic of torch operations."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

MATRIX_PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm)


def tensors_in(*values: Any) -> list[Tensor]:
    """Return the tensors in arguments or results of an operation. torch's pytree takes longer than small operations."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


class StorageTracker(TorchDispatchMode):
    """Context manager that tracks the storages allocated inside it.

    Attributes:
        peak: maximum total bytes of live storages.
        elementwise: bytes read and written by operations except matrix products and views.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bound = 0  # at least the total bytes of live storages
        self.peak = self.elementwise = 0

    def live_bytes(self) -> int:
        """Return the total bytes of the storages that are currently alive."""
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        self._bound = sum(size for _, size in self._storages.values())
        return self._bound

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = tensors_in(args, kwargs)
        input_storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        result = func(*args, **(kwargs or {}))
        outputs = tensors_in(result)
        new = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in input_storages]
        for tensor in new:
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self._bound += storage.nbytes()
        if self._bound > self.peak:  # looking at every storage after each operation takes longer than the operations
            self.peak = max(self.peak, self.live_bytes())
        if (func._schema.is_mutable or new) and func.overloadpacket not in MATRIX_PRODUCTS:
            self.elementwise += sum(t.numel() * t.element_size() for t in inputs + outputs)
        return result
