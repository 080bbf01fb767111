"""The plan: against numbers worked out by hand, against what autograd and DeepSpeed do, and its command line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pipeline.benchmarks.plan import CASES, launch, row
from pipeline.benchmarks.scale import ZERO, facts_of, published
from pipeline.common.errors import UserError
from pipeline.common.hardware import device_called, load_device
from pipeline.config.settings import Config, LossSettings, ModelSettings, TrainingSettings
from pipeline.models.solar_model import decode
from pipeline.plan.__main__ import parse
from pipeline.plan.command import make_plan, recipe_tree, suggestion
from pipeline.plan.corpus import Corpus
from pipeline.plan.gathers import DEFAULTS, ZeroSettings, gathers
from pipeline.plan.model_facts import activations
from pipeline.plan.prediction import Cluster, Plan
from pipeline.plan.step_time import flops
from pipeline.plan.suggest import nearest_fit
from pipeline.plan.traffic import Transfer, transfers
from pipeline.plan.workload import Run, Workload
from tests.conftest import Prepared
from tests.runs import TINY, python, refuses, write_recipe

# Of the models' cards on the hub.
PARAMETERS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Llama-3.1-70B": 70_553_706_496,
}
WORK = Workload(width=4096, tokens=4096, supervised=2048, sequences=16, pairs=14, rows=1000)


def plan_of(name: str, nodes: int = 1, gpu: str = "h100", checkpointing: bool = False, **loss: object) -> Plan:
    config = Config(
        model=ModelSettings(activation_checkpointing=checkpointing),
        loss=LossSettings(**loss),  # type: ignore[arg-type]
        training=TrainingSettings(train_batch_size=16 * nodes),
    )
    run = Run(config, facts_of(published()[name], 128), ZERO, WORK, 8 * nodes)
    return Plan(run, Cluster(nodes, 8, load_device(gpu)))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_model_and_of_its_card(name: str) -> None:
    facts = facts_of(published()[name], 1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**published()[name]))
    assert facts.parameters == sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert facts.parameters == sum(facts.matrices + facts.vectors)


def test_states_of_7b_on_eight_gpus_by_hand() -> None:
    plan = plan_of("Qwen2.5-7B")
    d, i, v, kv = 3584, 18944, 152064, 512
    layer = 2 * d * d + 2 * d * kv + 3 * d * i + (d + 2 * kv) + 2 * d
    own = (28 * layer + d + 2 * v * d) // 8  # every size divides by 8
    assert plan.memory.states == {
        "parameters": 2 * own,
        "persistent parameters": 2 * (28 * (d + 2 * kv + 2 * d) + d),
        "vocabulary gradients": 4 * 2 * v * d // 8,
        "reduce bucket": 2 * 500_000_000,
        "fp32 parameters": 4 * own,
        "Adam moments": 8 * own,
        "fp32 gradients": 4 * own,
    }


@pytest.mark.parametrize("name", ["Qwen2.5-7B", "Llama-3.1-70B"])
def test_activations_of_a_layer_by_hand(name: str) -> None:
    """What transformers' layer keeps under flash attention, tensor by tensor, in bytes per token."""
    f = published()[name]
    d, i = f["hidden_size"], f["intermediate_size"]
    kv = d // f["num_attention_heads"] * f["num_key_value_heads"]
    norm = 4 * d + 4 + 2 * d + 2 * d  # input in fp32, its inverse deviation, normalised, times weight
    attention = 2 * (d + kv + kv) + 2 * d + 4 * f["num_attention_heads"]  # q, k, v, output, log-sum-exps
    mlp = 4 * 2 * i  # gate, its SiLU, up, their product
    found = activations(facts_of(f).config, 2, 1024, "bf16", "flash_attention_2")
    assert found.layer == 2 * 1024 * (2 * norm + attention + mlp)
    assert found.hidden == 2 * 1024 * 2 * d


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_saves(model_type: str, checkpointing: bool) -> None:
    """Counted at autograd's own hooks, in a real forward pass with real sdpa; one layer more is what is compared."""

    def saved(layers: int) -> int:
        config = AutoConfig.for_model(
            **{**TINY, "model_type": model_type, "num_hidden_layers": layers, "vocab_size": 64}
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}
        held = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
                held.append(tensor)  # so that no address is used twice
            return tensor

        positions = torch.arange(32).repeat(2, 2)  # two sequences in each row
        embeddings = torch.randn(2, 64, config.hidden_size, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            held.append(decode(model, embeddings, positions))
        return sum(sizes.values())

    planned = activations(model_config(model_type), 2, 64, "fp32", "sdpa")
    assert saved(3) - saved(2) == pytest.approx(
        planned.kept(3, checkpointing) - planned.kept(2, checkpointing), rel=0.01
    )


def model_config(model_type: str) -> PreTrainedConfig:
    return AutoConfig.for_model(**{**TINY, "model_type": model_type, "vocab_size": 64})


def test_arithmetic_by_hand() -> None:
    """Llama-3.1-70B, a row of 4,096 tokens with 2,048 supervised positions."""
    d, i, kv, layers, v = 8192, 28672, 1024, 80, 128256
    matrices = layers * (2 * d * d + 2 * d * kv + 3 * d * i)
    found = flops(plan_of("Llama-3.1-70B", checkpointing=True).run)
    assert found.layers == 8 * matrices * 4096
    assert found.attention == layers * 4 * 4096 * 4096 * d * (1 + 1 + 2.5)
    assert found.loss == 3 * 2 * 2048 * v * d


def test_a_small_model_is_gathered_once_and_a_large_one_twice() -> None:
    small, large = facts_of(published()["Qwen2.5-0.5B"]), facts_of(published()["Llama-3.1-70B"])
    vectors = sum(n for n in small.vectors)
    assert gathers(small, ZERO, False).elements(8) == pytest.approx(small.decoder - vectors, rel=0.15)
    elements = gathers(large, ZERO, False).elements(8) / large.decoder
    assert 1.9 < elements < 2  # the last layers are still there when backward begins
    assert gathers(large, ZERO, False).live < 3 * ZERO.max_live_parameters


def test_defaults_are_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs = DeepSpeedZeroConfig(stage=3)
    assert {key: int(getattr(theirs, key.removeprefix("stage3_"))) for key in DEFAULTS} == DEFAULTS
    ours = ZeroSettings.read({"zero_optimization": {"stage": 3}})
    assert (ours.contiguous_gradients, ours.overlap_comm) == (theirs.contiguous_gradients, theirs.overlap_comm)


def test_between_nodes() -> None:
    ring = Transfer("x", 31.0, 1, 1, "ring", "alone")
    assert ring.between_nodes(8, 8) == 0
    assert ring.between_nodes(32, 8) == pytest.approx(3)  # 24 of the 31 other ranks' parts, through 8 cards
    assert Transfer("x", 31.0, 1, 1, "all-to-all", "alone").between_nodes(32, 8) == pytest.approx(24)
    assert Transfer("x", 31.0, 1, 1, "chain", "alone").between_nodes(32, 8) == pytest.approx(31 / 8)


def test_messages_that_follow_each_other() -> None:
    """By hand, 8 GPUs and two micro-steps: a collective on a ring has 7 hops, an all-reduce 14, a chain single ones."""
    shared = plan_of("Qwen2.5-0.5B").run
    found = {}
    for name, run in {
        "shared": shared,
        "gathered": plan_of("Qwen2.5-0.5B", head="gathered").run,
    }.items():
        assert run.accumulation == 2 and run.chunks.pieces == 1
        found[name] = {t.name: (t.calls, t.hops) for t in transfers(run)}
    assert found["shared"]["persistent parameters"] == (1, 7)
    assert found["shared"]["sums"] == (3, 3 * 14)
    # Layout 3, hidden states, statistics, gradients of the piece; summaries and inner products are all-reduces.
    assert found["shared"]["loss"] == (2 * 8, 2 * (6 * 7 + 2 * 14))
    # Layout 3 and the shards' sizes; summaries, cross entropy; two all-to-alls; 7 messages forward, 15 backward of
    # which 8 follow each other.
    assert found["gathered"]["loss"] == (2 * (4 + 2 + 2 + 22), 2 * (4 * 7 + 2 * 14 + 2 * 7 + 15))


def test_more_gpus_hold_less_and_take_less_time() -> None:
    plans = [plan_of("Qwen2.5-32B", nodes, checkpointing=True) for nodes in (2, 4, 16)]
    peaks = [plan.memory.peak for plan in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert plan_of("Qwen2.5-7B").memory.peak > plan_of("Qwen2.5-7B", checkpointing=True).memory.peak
    for plan in plans:
        assert max(plan.time.compute.values()) < plan.time.overlapped < plan.time.serial
        assert 0 < plan.mfu < plan.cluster.device.compute_efficiency


def test_the_nearest_that_fits_fits() -> None:
    plan = plan_of("Qwen2.5-32B", 2)
    assert not plan.fits
    found = nearest_fit(plan)
    assert found is not None and found[1].fits
    assert "model.activation_checkpointing true" in found[0]


def test_what_is_offloaded_must_fit_the_host() -> None:
    plan = plan_of("Llama-3.1-70B", checkpointing=True)
    moved = replace(plan, run=replace(plan.run, zero=replace(plan.run.zero, offload_optimizer=True)))
    assert plan.memory.peak > plan.available
    own = plan.run.own
    assert sorted(moved.memory.host.values()) == [4 * own, 4 * own, 4 * own, 8 * own]
    small = replace(moved, cluster=replace(moved.cluster, device=replace(moved.cluster.device, host_memory_gib=1000)))
    assert moved.fits and not small.fits


def test_a_corpus_of_a_billion_pairs() -> None:
    one, many = Corpus(1e9, 1), Corpus(1e9, 1000)
    assert one.pieces == many.pieces and one.seconds / many.seconds == pytest.approx(1000, rel=0.05)
    assert Corpus(1e6, 1000).seconds == pytest.approx(Corpus(1e6, 64).seconds, rel=0.1)  # no more pieces than that


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    tree = {
        "model": {"config": published()["Qwen2.5-7B"]},
        "data": {"shards": str(tmp_path / "none"), "tokenizer": "none"},
        "deepspeed": "ds_configs/zero3_bf16.json",
        "training": {"train_batch_size": 64},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


GUESS = ["--max_seq_length", "4096", "--rows", "1000"]


def test_suggested_recipe_is_one_and_plans_the_same(recipe: Path, tmp_path: Path) -> None:
    arguments = ["--config", str(recipe), "--gpu", "h200", *GUESS]
    plan, ds = make_plan(*parse(arguments))
    found = suggestion(plan, ds, recipe_tree(plan.run.config))
    (tmp_path / "ds.json").write_text(json.dumps(found["deepspeed"]))
    better = tmp_path / "better.yaml"
    better.write_text(yaml.safe_dump(found["recipe"] | {"deepspeed": str(tmp_path / "ds.json")}))
    again, _ = make_plan(*parse(["--config", str(better), *arguments[2:]]))
    assert again.fits and again.as_json()["seconds"] == found["plan"]["seconds"]
    assert again.time.overlapped <= plan.time.overlapped or not plan.fits
    assert {key for key, _, _ in found["reasons"]} >= {"loss.head", "model.activation_checkpointing"}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--gpu", "h10"], ["h10", "h100, h200"]),
        (["--nodes", "0"], ["--nodes is 0"]),
        (["--gpus_per_node", "7"], ["7 ranks", "vocab_multiple"]),
        (["--training.train_batch_size", "60"], ["60", "8 ranks"]),
        (["--training.train_batch"], ["unknown key", "training.train_batch_size"]),
        (["--deepspeed", "nowhere.json"], ["nowhere.json", "cannot read"]),
        (["--supervised_share", "1.5"], ["supervised_share", "between 0 and 1"]),
        (["--model.config", "null", "--model.path", "nowhere"], ["nowhere", "cannot load"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_wrong_configurations_are_one_line(recipe: Path, arguments: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(*parse(["--config", str(recipe), *GUESS, *arguments]))
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


def test_incomplete_configurations_are_one_line(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no packed shards; give --max_seq_length and --rows"):
        make_plan(*parse(["--config", str(recipe)]))
    tree = yaml.safe_load(recipe.read_text())
    del tree["model"]["config"]["vocab_size"]
    recipe.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"set model.config.vocab_size"):
        make_plan(*parse(["--config", str(recipe), *GUESS]))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"memory_gib": None}, "'memory_gib' is missing"),
        ({"memory_gib": "80 GB"}, "memory_gib is '80 GB'"),
        ({"memory_gb": 80}, "did you mean 'memory_gib'"),
        ({"network_gb_s": 0}, "network_gb_s is 0"),
    ],
)
def test_hardware_files_are_read_strictly(change: dict, part: str, tmp_path: Path) -> None:
    from pipeline.common.hardware import FOLDER

    tree = yaml.safe_load((FOLDER / "h100.yaml").read_text()) | change
    path = tmp_path / "gpu.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
    with pytest.raises(UserError) as caught:
        load_device(str(path))
    assert part in str(caught.value)


def test_a_gpu_is_known_by_torchs_name() -> None:
    device = device_called("NVIDIA H100 80GB HBM3")
    assert device is not None and device.flops("bf16") == 989e12
    assert device_called("Radeon") is None


def test_command_line(prepared: Prepared, recipe: Path, tmp_path: Path) -> None:
    """From packed shards, as JSON and nothing else; and a mistake."""
    own = write_recipe(tmp_path / "own.yaml", prepared.shards, prepared.tokenizer, training__train_batch_size=4)
    words = ("--config", own, "--gpus_per_node", 2, "--gpu", "a100", "--json")
    found = json.loads(python("-m", "pipeline.plan", *words).stdout)
    manifest = json.loads((prepared.shards / "manifest.json").read_text())
    assert found["tokens_per_row"] == manifest["max_seq_length"] and found["fits"] and found["max_steps"] == 5
    refuses(python("-m", "pipeline.plan", "--config", recipe), "no packed shards", "--max_seq_length")


@pytest.mark.slow
def test_bytes_messages_and_memory_of_real_steps() -> None:
    """Two ranks, five of the cases of `python -m pipeline.benchmarks.plan`, within the bounds of docs/scaling.md."""
    names = ["checkpointed", "gathered", "bf16", "chunked", "cut"]
    _, measured = launch(2, names)
    assert [figures["case"] for figures in measured] == names
    for figures in measured:
        case = next(case for case in CASES if case.name == figures["case"])
        found = row(case, 2, figures)
        assert abs(found["received_mb_error"]) < 0.05, found
        assert abs(found["calls"] - found["planned_calls"]) <= 1, found
        assert abs(found["states_mb_error"]) < 0.01, found
        assert abs(found["peak_mb_error"]) < 0.10, found
