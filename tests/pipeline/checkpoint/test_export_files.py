"""Temporary directories of exports."""

import os
import time
from pathlib import Path

from pipeline.checkpoint.export_files import ABANDONED_SECONDS, remove_abandoned


def test_remove_abandoned_keeps_exports_that_are_being_written(tmp_path: Path) -> None:
    long_ago = time.time() - ABANDONED_SECONDS - 60
    for name, ages in {"killed": [long_ago, long_ago], "running": [long_ago, time.time()]}.items():
        partial = tmp_path / f".hf.{name}.partial"
        partial.mkdir()
        for number, age in enumerate(ages):
            (partial / f"part-{number}").touch()
            os.utime(partial / f"part-{number}", (age, age))
        os.utime(partial, (long_ago, long_ago))
    (tmp_path / ".other.killed.partial").mkdir()
    os.utime(tmp_path / ".other.killed.partial", (long_ago, long_ago))
    remove_abandoned(tmp_path / "hf")
    assert sorted(os.listdir(tmp_path)) == [".hf.running.partial", ".other.killed.partial"]
