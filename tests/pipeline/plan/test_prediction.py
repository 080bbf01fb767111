"""Estimated FLOPs and time."""

from dataclasses import replace

import pytest

from tests.pipeline.plan.cases import prediction_of


def test_flops_of_70b_match_hand_count() -> None:
    """One row of 4,096 tokens in 16 sequences, with 2,048 target tokens."""
    d, i, kv, layers, v = 8192, 28672, 1024, 80, 128256
    matrices = layers * (2 * d * d + 2 * d * kv + 3 * d * i)
    flops = prediction_of("Llama-3.1-70B", checkpointing=True).flops
    assert flops.layers == 8 * matrices * 4096
    assert flops.attention == layers * 4 * 4096 * (4096 / 16 / 2) * d * (1 + 1 + 2.5)
    assert flops.loss == 3 * 2 * 2048 * v * d


def test_prediction_needs_less_memory_on_more_gpus() -> None:
    peaks = [prediction_of("Qwen2.5-32B", nodes, checkpointing=True).memory.peak for nodes in (2, 4, 16)]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3


def test_prediction_needs_less_memory_with_checkpointing() -> None:
    assert prediction_of("Qwen2.5-7B").memory.peak > prediction_of("Qwen2.5-7B", checkpointing=True).memory.peak


def test_prediction_of_shared_rows() -> None:
    """Eight GPUs share rows of 4,096 tokens in a model of 64 layers with 40 query and 8 key-value heads of size 128."""
    whole = prediction_of("Qwen2.5-32B")
    config = whole.run.config
    training = replace(config.training, sequence_parallel_size=8)
    shared = replace(whole, run=replace(whole.run, config=replace(config, training=training)))
    assert shared.run.gradient_accumulation_steps == 8 * whole.run.gradient_accumulation_steps == 16
    assert 8 * shared.run.activations.hidden == whole.run.activations.hidden
    # The output of attention is stored once by tokens and once by heads.
    extra = 512 * 5120 * 2
    assert 8 * (shared.run.activations.layer - extra) == pytest.approx(whole.run.activations.layer, rel=0.01)
    assert 8 * shared.flops.total == pytest.approx(whole.flops.total)
    transfer = next(t for t in shared.transfers if t.name == "attention heads")
    assert transfer.received == 16 * 64 * 2 * 512 * (2 * 40 + 2 * 8) * 128 * 2 * 7 / 8
    assert transfer.calls == 16 * 64 * 2 * 2
    assert transfer.between_nodes(64, 8) == 0 < transfer.between_nodes(64, 4)


def test_overlapped_time_lies_between_compute_and_serial_time() -> None:
    for nodes in (2, 4, 16):
        prediction = prediction_of("Qwen2.5-32B", nodes, checkpointing=True)
        time = prediction.time
        assert max(time.compute.values()) < time.overlapped < time.serial
        assert 0 < prediction.mfu < prediction.cluster.device.compute_efficiency
