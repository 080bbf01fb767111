"""Locks of DeepSpeed op builds: those of an interrupted build are deleted or named."""

import os
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from pipeline.zero3.op_locks import STALE_SECONDS, handle_stale_locks


def test_handle_stale_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    source, lock = tmp_path / "cpu_adam" / "main.cpp", tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    source.touch()
    long_ago = time.time() - 2 * STALE_SECONDS

    def age(*files: Path) -> None:
        for file in files:
            os.utime(file, (long_ago, long_ago))

    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    age(source, lock)
    handle_stale_locks()  # this process is building
    assert lock.exists() and capsys.readouterr().out == ""

    assert baton.fd is not None
    os.close(baton.fd)  # as when the building process is killed
    source.touch()
    handle_stale_locks()  # another host could be building
    assert lock.exists()
    (line,) = capsys.readouterr().out.splitlines()
    assert "waiting for another build of cpu_adam" in line and line.endswith(f"delete {lock}")

    age(source)
    handle_stale_locks()
    assert not lock.exists()
    assert f"deleted {lock}" in capsys.readouterr().out


def test_lock_of_a_build_on_a_file_system_with_another_clock_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()  # as another host does when it begins to build
    present = time.time()
    monkeypatch.setattr(time, "time", lambda: present + 2 * STALE_SECONDS)
    handle_stale_locks()
    assert lock.exists() and "waiting for another build of cpu_adam" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["cpu_adam"]
