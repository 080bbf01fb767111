"""Several shard directories in one run: paired translations beside unpaired instructions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep.packing.packer import pack
from data_prep.packing.settings import PackSettings
from data_prep.ranks import Ranks
from data_prep.shards.format import MANIFEST, ShardSet
from data_prep.tokenization.tokenizer import load_tokenizer
from pipeline.common.atomic_io import write_json
from pipeline.common.errors import UserError
from pipeline.config.recipe import load_config
from pipeline.config.settings import Config
from pipeline.data.loader import epoch_order
from pipeline.data.micro_batch import local_normalizers
from pipeline.data.mixture import ShardMixture
from pipeline.plan.dry_run import workload_summary
from pipeline.training.preflight import PreparedRun, prepare_run
from tests.conftest import Prepared
from tests.data_prep.tokenization.test_tokenizer import earlier_fingerprint
from tests.runs import write_recipe


def pack_instructions(directory: Path, tokenizer: Path, template: str | None = None, lang: str = "de") -> Path:
    """Pack instructions in German, without translations. Their ids are those of the translations."""
    records = directory / "instructions.jsonl"
    with open(records, "w", encoding="utf-8") as file:
        for i in range(1, 25):
            texts = {"question": f"Zähle bis {i}.", "answer": " ".join(map(str, range(i)))}
            file.write(json.dumps({"pair_id": f"train-{i:06d}", "lang": lang, **texts}) + "\n")
    settings = PackSettings(max_seq_length=96, pivot=lang, chat_template=template)
    pack([records], str(tokenizer), directory / "instructions", settings, Ranks())
    return directory / "instructions"


@pytest.fixture(scope="module")
def instructions(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_instructions(tmp_path_factory.mktemp("instructions"), prepared.tokenizer)


def recipe(path: Path, prepared: Prepared, shards: list[Path], **changes: object) -> Config:
    changes["data__shards"] = [str(shard) for shard in shards]
    return load_config(write_recipe(path / "run.yaml", prepared.shards, prepared.tokenizer, **changes), [])


def run_of(prepared: Prepared, instructions: Path, path: Path, rank: int = 0, ranks: int = 1) -> PreparedRun:
    config = recipe(path, prepared, [prepared.shards, instructions], data__source_weights=[3.0, 1.0])
    return prepare_run(config, rank, ranks)


def test_mixture_rows_and_manifest(prepared: Prepared, instructions: Path) -> None:
    sources = [ShardSet.open(prepared.shards), ShardSet.open(instructions)]
    mixture = ShardMixture(sources)
    assert len(mixture) == sum(map(len, sources)) == mixture.manifest["totals"]["rows"]
    assert set(mixture.manifest["languages"]) == {lang for s in sources for lang in s.manifest["languages"]}
    first, last = mixture[0], mixture[len(mixture) - 1]
    np.testing.assert_array_equal(first.input_ids, sources[0][0].input_ids)
    np.testing.assert_array_equal(last.input_ids, sources[1][len(sources[1]) - 1].input_ids)
    assert last.pair_id == [f"{instructions}:{pair_id}" for pair_id in sources[1][len(sources[1]) - 1].pair_id]
    assert ShardMixture(sources[:1])[0].pair_id == sources[0][0].pair_id
    with pytest.raises(IndexError):
        mixture[len(mixture)]


def test_mixture_batches_do_not_depend_on_ranks_and_resume(
    prepared: Prepared, instructions: Path, tmp_path: Path
) -> None:
    """The rows of a batch without pairs have cross entropy only."""
    alone = run_of(prepared, instructions, tmp_path).loader
    ranks = [run_of(prepared, instructions, tmp_path, rank, 2).loader for rank in range(2)]
    unpaired_rows = 0
    for step in range(6):
        if step == 3:  # continue on one rank from the state of two
            alone = run_of(prepared, instructions, tmp_path).loader
            alone.load_state_dict(ranks[1].state_dict())
        batches = alone.next()
        parts = [batch for loader in ranks for batch in loader.next()]
        assert sorted(str(b.input_ids.tolist()) for b in batches) == sorted(str(b.input_ids.tolist()) for b in parts)
        for batch in batches:
            if batch.pair_ids[0].startswith(str(instructions)):
                unpaired_rows += 1
                normalizers = local_normalizers([batch])
                assert normalizers.pairs == 0 and normalizers.tokens > 0
    assert unpaired_rows > 0


def test_mixture_epoch_follows_source_weights(prepared: Prepared, instructions: Path, tmp_path: Path) -> None:
    run = run_of(prepared, instructions, tmp_path)
    sizes = [len(source) for source in run.shards.sources]
    weights = run.shards.sampling_weights([3.0, 1.0], {})
    assert weights is not None
    counts = np.bincount(epoch_order(sum(sizes), weights, 7, 0), minlength=sum(sizes))
    assert counts[: sizes[0]].sum() == pytest.approx(0.75 * sum(sizes), abs=1)
    assert counts[: sizes[0]].max() - counts[: sizes[0]].min() <= 1
    both = run.shards.sampling_weights([3.0, 1.0], {"de": 2.0})
    assert both is not None and both[-1] == pytest.approx(2 * weights[-1])
    assert run.shards.sampling_weights(None, {}) is None
    assert workload_summary(run)["rows"] == sum(sizes)
    run.loader.row_weights = run.shards.sampling_weights([0.25, 0.75], {})
    shards = run.shards.sources[0].manifest["shards"]  # the other directory has no pairs
    pairs = 0.25 * run.config.training.train_batch_size * sum(shard["pairs"] for shard in shards) / sizes[0]
    assert workload_summary(run)["pairs per step"] == pytest.approx(pairs, abs=0.05)
    single = prepare_run(recipe(tmp_path, prepared, [prepared.shards]), 0, 1)
    assert run.fingerprints["data.shards"] != single.fingerprints["data.shards"]


def test_prepare_run_accepts_earlier_fingerprint_and_any_pivot(
    prepared: Prepared, instructions: Path, tmp_path: Path
) -> None:
    """A source and the validation shards were packed by an earlier version, with the pivot of the second source."""
    earlier = shutil.copytree(instructions, tmp_path / "earlier")
    manifest = json.loads((earlier / MANIFEST).read_text())
    manifest["tokenizer"]["fingerprint"] = earlier_fingerprint(load_tokenizer(prepared.tokenizer))
    write_json(earlier / MANIFEST, manifest)
    config = recipe(tmp_path, prepared, [prepared.shards, earlier], data__eval_shards=str(earlier))
    assert prepare_run(config, 0, 1).eval_loader is not None
    manifest["pivot"] = "fr"
    evaluation = shutil.copytree(earlier, tmp_path / "evaluation")
    write_json(evaluation / MANIFEST, manifest)
    config = recipe(tmp_path, prepared, [prepared.shards, earlier], data__eval_shards=str(evaluation))
    with pytest.raises(UserError, match=f"{evaluation}: packed with another pivot language"):
        prepare_run(config, 0, 1)


def test_prepare_run_refuses_two_spellings_of_a_language(prepared: Prepared, tmp_path: Path) -> None:
    other = pack_instructions(tmp_path, prepared.tokenizer, lang="EN")
    with pytest.raises(UserError, match=rf"{other}: the languages EN and en are two spellings .*, and pack again"):
        prepare_run(recipe(tmp_path, prepared, [prepared.shards, other]), 0, 1)


def test_prepare_run_refuses_sources_of_different_templates(prepared: Prepared, tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    other = pack_instructions(tmp_path, prepared.tokenizer, template)
    with pytest.raises(
        UserError, match=f"{other}: packed with a chat template that differs from that of {prepared.shards}"
    ):
        prepare_run(recipe(tmp_path, prepared, [prepared.shards, other]), 0, 1)
    with pytest.raises(UserError, match=f"{tmp_path}/none: no shards; create them with"):
        prepare_run(recipe(tmp_path, prepared, [prepared.shards, tmp_path / "none"]), 0, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.shards", "[]"], "data.shards is empty"),
        (["--data.shards", "[a, a]"], "data.shards names a directory twice"),
        (["--data.shards", "[a, b/../a/]"], "data.shards names a directory twice"),
        (["--data.shards", "[a, b]", "--data.source_weights", "[1.0]"], "1 numbers, but data.shards names 2"),
        (["--data.source_weights", "[0.5, 0.5]"], "2 numbers, but data.shards names 1 directories"),
        (["--data.shards", "[a, b]", "--data.source_weights", "[1.0, 0]"], r"source_weights\[1\] is 0.*greater than 0"),
    ],
)
def test_load_config_refuses_sources(arguments: list[str], message: str, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "run.yaml", Path("shards"), Path("tokenizer"))
    with pytest.raises(UserError, match=message):
        load_config(path, arguments)


def test_load_config_reads_sources_from_command_line(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "run.yaml", Path("shards"), Path("tokenizer"))
    data = load_config(path, ["--data.shards", "[runs/a, runs/b]", "--data.source_weights", "[0.7, 0.3]"]).data
    assert (data.shards, data.source_weights) == (["runs/a", "runs/b"], [0.7, 0.3])
    assert load_config(path, ["--data.shards", "runs/c"]).data.shards == "runs/c"
