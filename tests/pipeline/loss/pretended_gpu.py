"""Tensors in host memory that pretend to be on a GPU, to find where the host waits for it or mixes devices.

Operators run on the CPU. Those with results on the host, copies from memory that is not pinned, and indexing by a mask
are recorded, because the host waits for a GPU there.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pipeline import loss

DEVICE, PACKAGE = "cuda:0", Path(loss.__file__).parent
aten = torch.ops.aten
WAITING = {  # their result, or its size, is needed on the host
    *(aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default),
    *(aten.masked_select.default, aten._unique2.default, aten.bincount.default),
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class OnGpu(torch.Tensor):
    """A tensor whose data is `data_on_cpu`. To torch itself it is on the CPU, so its own copies do nothing."""

    data_on_cpu: Tensor
    is_cuda = True  # type: ignore[assignment]
    device = torch.device(DEVICE)
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, data: Tensor) -> "OnGpu":
        made: OnGpu = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype
        )
        made.data_on_cpu = data
        return made

    def cpu(self, *_: Any) -> Tensor:
        record("cpu()")
        return self.data_on_cpu

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def to(self, *args: Any, **options: Any) -> Tensor:
        targets = [x for x in (*args, options.pop("device", None)) if isinstance(x, str | torch.device)]
        args = tuple(x for x in args if not isinstance(x, str | torch.device))
        if targets and torch.device(targets[0]).type == "cpu":
            return self.cpu().to(*args) if args else self.cpu()
        return super().to(*args) if args else self

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return run(function, args, kwargs or {})


class Factories(TorchDispatchMode):
    """Makes tensors for the device, too."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


waits: list[str] = []


def record(what: str) -> None:
    """Record a wait with the line of the loss that caused it."""
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent == PACKAGE]
    if frames:
        waits.append(f"{Path(frames[-1].filename).name}: {frames[-1].line} ({what})")


def run(function: Any, args: Any, options: dict[str, Any]) -> Any:
    """Run an operator on the CPU. Its results are on the GPU if an operand is, or if it makes them there.

    Raises:
        RuntimeError: the operands are on different devices.
    """
    tensors = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
    on_gpu = [x for x in tensors if isinstance(x, OnGpu)]
    makes = torch.device(options.get("device") or "cpu").type == "cuda"
    is_copy = function in (aten._to_copy.default, aten.copy_.default)
    mixed = on_gpu and any(x.dim() for x in tensors if not isinstance(x, OnGpu))
    if mixed if is_copy else on_gpu and function in WAITING:
        record(str(function))
    elif mixed and function.namespace == "aten" and not (function in INDEXING and not isinstance(args[0], OnGpu)):
        raise RuntimeError(f"{function}: operands on different devices")
    if is_copy and makes and not on_gpu and not (options.get("non_blocking") and hasattr(args[0], "pinned")):
        record("not pinned")
    if function in INDEXING and on_gpu and any(x is not None and x.dtype == torch.bool for x in args[1]):
        record("mask")
    known = {id(x.data_on_cpu): x for x in on_gpu}
    args, options = tree_map(lambda x: x.data_on_cpu if isinstance(x, OnGpu) else x, (args, options))
    results = function(*args, **{key: value for key, value in options.items() if not (makes and key == "device")})

    def place(result: Any) -> Any:
        if not isinstance(result, Tensor) or not (on_gpu or makes) or function.namespace == "c10d":
            return result
        return known[id(result)] if id(result) in known else OnGpu(result)

    return tree_map(place, results)


def _pin(tensor: Tensor) -> Tensor:
    pinned = tensor.clone()
    pinned.pinned = True  # type: ignore[attr-defined]
    return pinned


@contextmanager
def pretended_gpu() -> Iterator[list[str]]:
    """Let torch accept that there is a GPU. Yields the list in which the waits of all threads are recorded."""
    waits.clear()
    with patch.object(torch.cuda, "_lazy_init", lambda: None), patch.object(Tensor, "pin_memory", _pin):
        yield waits
    waits.clear()


@contextmanager
def tensors_on_gpu() -> Iterator[None]:
    """Let this thread make tensors on `DEVICE`, and run backward passes itself."""
    with torch.autograd.set_multithreading_enabled(False), Factories():
        yield
