"""Writes to a full disk, checksums, and host copies that later changes to the state do not reach."""

import errno
import mmap
import os
import subprocess
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.checkpoint.file_io import LARGE_BYTES, HostCopies, write_file
from pipeline.common.atomic_io import sha256_file
from pipeline.common.errors import StorageError, UserError, write_error


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("content", [bytes(2_000_000), {"weights": torch.zeros(500_000)}], ids=["bytes", "tensors"])
def test_write_file_full_disk(tmp_path: Path, content: object) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mount is not permitted here")
    message = r"cannot write .*part.pt: No space left on device; free disk space and restart"
    try:
        with pytest.raises(UserError, match=message):
            write_file(tmp_path / "part.pt", content)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("content", [b"abc", {"weights": torch.arange(300_000), "step": 7}], ids=["bytes", "tensors"])
def test_write_file_returns_size_and_checksum(tmp_path: Path, content: object) -> None:
    path = tmp_path / "zero" / "part.pt"
    assert write_file(path, content) == (path.stat().st_size, sha256_file(path))
    if isinstance(content, dict):
        assert torch.equal(torch.load(path)["weights"], content["weights"])


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EIO, StorageError), (errno.ESTALE, StorageError), (errno.ENOSPC, UserError), (errno.EACCES, UserError)],
)
def test_write_error_is_retried_if_its_cause_may_pass(number: int, kind: type[UserError]) -> None:
    error = write_error(Path("part.pt"), OSError(number, os.strerror(number)))
    assert type(error) is kind and str(error).startswith(f"cannot write part.pt: {os.strerror(number)};")


def test_host_copies_keep_values_and_reuse_memory() -> None:
    copies = HostCopies()
    state = {"part": OrderedDict(a=torch.arange(6.0).view(2, 3).T), "list": [torch.ones(2, dtype=torch.int64), "x"]}
    first = copies.copy_to_host(state)
    kept = first["part"]["a"]
    state["part"]["a"].add_(1)
    state["list"][0].zero_()
    assert type(first["part"]) is OrderedDict and torch.equal(kept, torch.arange(6.0).view(2, 3).T)
    assert first["list"][0].tolist() == [1, 1] and first["list"][1] == "x"
    second = copies.copy_to_host(state)
    assert second["part"]["a"].data_ptr() == kept.data_ptr() and torch.equal(second["part"]["a"], state["part"]["a"])
    assert copies.copy_to_host({"other": torch.zeros(5)})["other"].shape == (5,)


class OnGpu(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    is_cuda = True  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl


def test_large_host_copies_take_no_more_pinned_memory_than_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch itself would take 128 MiB for a tensor of 64 MiB and 20 bytes."""
    pinned: dict[int, int] = {}
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: pinned.update({address: size}) or 0, cudaHostUnregister=pinned.pop
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    copies, state = HostCopies(), torch.arange(LARGE_BYTES // 4 + 5, dtype=torch.float32)
    (copied,) = copies.copy_to_host([state.as_subclass(OnGpu)])
    assert pinned == {copied.data_ptr(): LARGE_BYTES + 20} and copied.data_ptr() % mmap.PAGESIZE == 0
    assert torch.equal(copied, state)
    (second,) = copies.copy_to_host([(state * 2).as_subclass(OnGpu)])
    assert second is copied and torch.equal(second, state * 2)
    del copied, second
    (other,) = copies.copy_to_host([state[:-1].as_subclass(OnGpu)])
    assert pinned == {other.data_ptr(): LARGE_BYTES + 16}


def test_refused_pages_leave_no_error_for_the_next_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA keeps the error of a failed call, and torch raises it after the next kernel."""
    errors: list[str] = []
    empty, state = torch.empty, torch.arange(LARGE_BYTES // 4, dtype=torch.float32)

    def zeros(*shape: int, device: torch.device) -> torch.Tensor:
        if errors:
            raise RuntimeError(errors.pop())
        return empty(shape)

    def register(address: int, size: int, flags: int) -> int:
        errors.append("out of memory")
        return 2

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: empty(shape, dtype=dtype))
    (copied,) = HostCopies().copy_to_host([state.as_subclass(OnGpu)])
    assert not errors and torch.equal(copied, state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_refused_pages_of_a_gpu_leave_no_error_for_the_next_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.checkpoint.file_io.HOST_REGISTER_PORTABLE", 1 << 30)  # no such flag
    state = torch.arange(LARGE_BYTES // 4, dtype=torch.float32, device="cuda")
    (copied,) = HostCopies().copy_to_host([state])
    assert copied.is_pinned() and torch.equal(copied, (state + 0).cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_large_host_copies_of_a_gpu_are_pinned() -> None:
    state = torch.arange(LARGE_BYTES // 4 + 5, dtype=torch.float32, device="cuda")
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    (copied,) = HostCopies().copy_to_host([state])
    assert copied.is_pinned() and torch.equal(copied, state.cpu())
    assert torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) == before
