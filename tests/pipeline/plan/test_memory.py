"""Estimated memory, against numbers computed by hand."""

from dataclasses import replace

from pipeline.plan.memory import estimate_memory
from pipeline.plan.prediction import Prediction
from tests.pipeline.plan.cases import prediction_of


def test_states_of_7b_match_hand_count() -> None:
    d, i, v, kv = 3584, 18944, 152064, 512
    layer = 2 * d * d + 2 * d * kv + 3 * d * i + (d + 2 * kv) + 2 * d
    local = (28 * layer + d + 2 * v * d) // 8  # every size divides by 8
    assert prediction_of("Qwen2.5-7B").memory.states == {
        "parameters": 2 * local,
        "persistent parameters": 2 * (28 * (d + 2 * kv + 2 * d) + d),
        "vocabulary gradients": 4 * 2 * v * d // 8,
        "reduce bucket": 2 * 500_000_000,
        "fp32 parameters": 4 * local,
        "Adam moments": 8 * local,
        "fp32 gradients": 4 * local,
    }


def with_host_memory(prediction: Prediction, gib: float) -> Prediction:
    device = replace(prediction.cluster.device, host_memory_gib=gib)
    return replace(prediction, cluster=replace(prediction.cluster, device=device))


def test_offloaded_optimizer_must_fit_in_host_memory() -> None:
    prediction = prediction_of("Llama-3.1-70B", checkpointing=True)
    run = replace(prediction.run, zero=replace(prediction.run.zero, offload_optimizer=True))
    offloaded = replace(prediction, run=run)
    assert prediction.memory.peak > prediction.available
    local = run.local_elements
    # Gradients are pinned: 8.8 x 10^9 in one tensor, and in nine of at most about 10^9 and one with those of vectors.
    assert offloaded.memory.host == {
        "fp32 parameters": 4 * local,
        "Adam moments": 8 * local,
        "fp32 gradients": 2**36,
        "optimizer's gradients": 9 * 2**32 + 2**20,
    }
    assert offloaded.fits and not with_host_memory(offloaded, 1000).fits


def test_offloaded_state_of_cpu_ranks_is_not_pinned() -> None:
    run = prediction_of("Qwen2.5-0.5B").run
    zero = replace(run.zero, offload_optimizer=True, offload_param=True)
    host = estimate_memory(replace(run, zero=zero, gpu=False)).host
    assert sorted(host.values()) == [size * run.local_elements for size in (2, 4, 4, 4, 8)]


def test_offloaded_parameters_are_copied_to_the_gpu_on_one_rank_too() -> None:
    """Gather parameters on one rank only if they are in host memory."""
    run = replace(prediction_of("Qwen2.5-0.5B").run, ranks=1)
    offloaded = replace(run, zero=replace(run.zero, offload_param=True))
    gathered = [estimate_memory(r).loss["gathered parameters"] for r in (run, offloaded)]
    assert gathered == [0, run.gathers.peak_live * 2] and gathered[1] > 0


def test_selection_on_a_gpu_matches_hand_count() -> None:
    """The maximum of each block in bf16, its int16 number, and 20 selected logits: two copies and three int64 indices.

    With one rank, this is more than what the backward pass needs besides the logits.
    """
    run = replace(prediction_of("Qwen2.5-0.5B").run, ranks=1)
    blocks = 151936 / 32
    expected = run.chunking.subchunk_tokens * (blocks * (2 + 2) + 20 * (2 * 2 + 3 * 8))
    assert estimate_memory(run).loss["top-k"] == expected
