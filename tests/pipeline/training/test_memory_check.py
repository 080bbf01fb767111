"""The warning before a run that does not fit in memory."""

from dataclasses import replace

import pytest
from transformers import AutoConfig

from pipeline.config.settings import Config, TrainingSettings
from pipeline.models.loading import meta_model
from pipeline.training.memory_check import GIB, MemoryNeed, describe_shortage, memory_need, memory_warning
from tests.runs import TINY

CONFIG = Config(training=TrainingSettings(precision="bf16"))
ON_GPU: dict = {"zero_optimization": {"stage": 3}}
OFFLOADED: dict = {"zero_optimization": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}}


def test_memory_need_counts_states_where_they_are() -> None:
    assert memory_need(CONFIG, ON_GPU, 7 * GIB, 8) == MemoryNeed(18 * 7 * GIB // 8, 0, 12 * 7 * GIB // 8)
    foreground = replace(CONFIG, training=replace(CONFIG.training, save_in_background=False))
    assert memory_need(foreground, OFFLOADED, 7 * GIB, 8) == MemoryNeed(0, 18 * 7 * GIB // 8, 0)


@pytest.mark.parametrize(
    ("need", "device", "host", "expected"),
    [
        ((70, 0, 40), 79, 1000, None),
        ((200, 0, 40), 79, 1000, "200.0 GiB on each GPU, which has 79.0 GiB free; use at least 21 GPUs, or offload"),
        ((10, 90, 60), 79, 1000, "need 1200.0 GiB of host memory, of which 1000.0 GiB are available; set training."),
        ((10, 150, 60), 79, 1000, "need 1680.0 GiB of host memory, of which 1000.0 GiB are available; use more nodes"),
        ((100, 0, 60), None, 1000, "need 1280.0 GiB of host memory"),
    ],
    ids=["fits", "GPU", "copies", "offloaded", "CPU ranks"],
)  # fmt: skip
def test_describe_shortage_says_what_fits(need: tuple, device: int | None, host: int, expected: str | None) -> None:
    sizes = MemoryNeed(*(size * GIB for size in need))
    warning = describe_shortage(sizes, device and device * GIB, host * GIB, ranks=8, ranks_per_node=8)
    assert warning is None if expected is None else warning is not None and expected in warning


def test_memory_warning_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model(**TINY, vocab_size=600)
    parameters = sum(parameter.numel() for parameter in meta_model(config).parameters())
    needed = (2 + 16 + 12) * parameters
    for host, short in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr("pipeline.training.memory_check.available_host_memory", lambda host=host: host)
        assert (memory_warning(CONFIG, ON_GPU, config, 1, 1) is not None) == short
