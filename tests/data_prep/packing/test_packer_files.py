"""Failed reads and writes of packing lose no work, and outputs that are not shards are left alone."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import readers
from data_prep.packing import packer
from data_prep.packing.settings import PackSettings
from data_prep.shards.verification import verify
from pipeline.common.errors import StorageError, UserError
from tests.data_prep.packing.helpers import EN, FR, STEPS, contents, run, write_records


@pytest.mark.parametrize("error", [OSError(28, "No space left on device", "x"), OSError("disk full")])
@pytest.mark.parametrize("step", STEPS)
def test_pack_keeps_work_folder_if_disk_is_full(step, error, demo_file, tokenizer_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(packer, step, lambda *args: (_ for _ in ()).throw(error))
        with pytest.raises(UserError, match=r"(x: No space left on device|output: disk full); fix it and run again"):
            run([demo_file], tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    run([demo_file], tokenizer_dir, tmp_path / "out")
    verify(tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_pack_keeps_work_folder_if_input_cannot_be_read(demo_file, tokenizer_dir, tmp_path, monkeypatch):
    records = [json.loads(line) for line in demo_file.read_text("utf-8").splitlines()]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "in.parquet")
    with monkeypatch.context() as patch:
        patch.setattr(pq.ParquetFile, "iter_batches", lambda *args, **kwargs: Path("/proc/self/mem").read_bytes())
        with pytest.raises(StorageError, match=r"cannot read .*in.parquet: Input/output error"):
            run([tmp_path / "in.parquet"], tokenizer_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    run([tmp_path / "in.parquet"], tokenizer_dir, tmp_path / "out")
    verify(tmp_path / "out")


def test_pack_writes_to_target_of_link(demo_file, tokenizer_dir, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "shards")
    run([demo_file], tokenizer_dir, tmp_path / "link")
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["shards"]
    assert len(verify(tmp_path / "link"))


def test_pack_rejects_unwritable_and_foreign_output(demo_file, tokenizer_dir, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="Not a directory"):
        run([demo_file], tokenizer_dir, tmp_path / "file" / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="not a shard directory"):
        run([demo_file], tokenizer_dir, tmp_path / "other")
    assert contents(tmp_path / "other") == {"notes.txt": b"x"}


def test_pack_finds_row_of_first_skipped_record_only(tokenizer_dir, tmp_path, monkeypatch):
    """Finding a row reads the file up to it, so that finding many takes quadratic time."""
    bad = [("p", "sw", "q", "a </s> b"), ("p", "sw", "q", "")]
    source = write_records(tmp_path / "a.jsonl", EN, FR, *bad * 50)
    with open(source, "a") as file:
        file.write("{\n" * 50)
    located: list[int] = []
    locate = readers.locate

    def record(path: Path, position: int) -> str:
        located.append(position)
        return locate(path, position)

    monkeypatch.setattr(readers, "locate", record)
    monkeypatch.setattr(packer, "split_inputs", lambda paths: readers.split_inputs(paths, 1000))
    manifest = run([source], tokenizer_dir, tmp_path / "out", PackSettings(on_bad_record="skip"))
    assert manifest["drops"] == {"bad_record": {"sw": 100, "?": 50}}
    assert 0 < len(located) < len(readers.split_inputs([source], 1000))


@pytest.mark.parametrize("name", ["blank.jsonl", "blank.parquet"])
def test_pack_says_that_the_input_has_no_records(name, tokenizer_dir, tmp_path):
    (tmp_path / "blank.jsonl").write_text("\n\n")
    pq.write_table(pa.table({"pair_id": pa.array([], pa.string())}), tmp_path / "blank.parquet")
    with pytest.raises(UserError, match=r"^nothing is left to pack: the input has no records$"):
        run([tmp_path / name], tokenizer_dir, tmp_path / "out")


def test_pack_starts_again_if_the_input_is_divided_otherwise(demo_file, tokenizer_dir, tmp_path, monkeypatch):
    """The finished parts are numbered by split, and another version may divide the input otherwise."""
    with monkeypatch.context() as patch:
        patch.setattr(packer, "split_inputs", lambda paths: readers.split_inputs(paths, 5000))
        patch.setattr(packer, "write_row_plan", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run([demo_file], tokenizer_dir, tmp_path / "out")
    for name in ("out", "whole"):
        run([demo_file], tokenizer_dir, tmp_path / name)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_pack_says_that_another_version_of_the_packer_made_the_output(tokenizer_dir, tmp_path):
    inputs = [write_records(tmp_path / "in.jsonl", EN, FR)]
    run(inputs, tokenizer_dir, tmp_path / "out")
    file = tmp_path / "out" / "manifest.json"
    manifest = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(manifest | {"packer_version": manifest["packer_version"] - 1}))
    with pytest.raises(UserError, match=r"out: made by another version of the packer.*train on it as it is"):
        run(inputs, tokenizer_dir, tmp_path / "out")
