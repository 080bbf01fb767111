"""Atomic writes, tolerant reads and the check of output directories."""

import os
from pathlib import Path

import pytest

from pipeline.common.atomic_io import ensure_writable, read_json_or_none, write_atomically
from pipeline.common.errors import UserError


@pytest.mark.parametrize("durable", [True, False])
def test_write_atomically_text_and_bytes(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "file"
    write_atomically(path, "größer", durable)
    assert path.read_bytes() == "größer".encode()
    write_atomically(path, b"\xff", durable)
    assert path.read_bytes() == b"\xff" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b'{"a": 1', b"[1]", b"\xff", b""], ids=["truncated", "list", "not UTF-8", "empty"])
def test_read_json_or_none_unusable(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.json"
    assert read_json_or_none(path) is None
    path.write_bytes(content)
    assert read_json_or_none(path) is None
    path.write_bytes(b'{"a": 1}')
    assert read_json_or_none(path) == {"a": 1}


def test_ensure_writable_names_directory_and_setting(tmp_path: Path) -> None:
    ensure_writable(tmp_path / "new" / "run")
    assert (tmp_path / "new" / "run").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run: cannot write .*; change output_dir$"):
        ensure_writable(tmp_path / "file" / "run", setting="output_dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_ensure_writable_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"permission denied\); change --output$"):
        ensure_writable(tmp_path)
