"""Simulated parameter gathers."""

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from pipeline.plan.gathers import DEEPSPEED_DEFAULTS, ZeroSettings, simulate_gathers
from tests.pipeline.plan.cases import ZERO, stats_of


def test_simulation_gathers_small_model_once_and_large_model_twice() -> None:
    small, large = stats_of("Qwen2.5-0.5B"), stats_of("Llama-3.1-70B")
    once = small.decoder_parameters - sum(small.vectors)
    assert simulate_gathers(small, ZERO, False).gathered_elements(8) == pytest.approx(once, rel=0.15)
    simulation = simulate_gathers(large, ZERO, False)
    # The last layers are still available when backward begins.
    assert 1.9 < simulation.gathered_elements(8) / large.decoder_parameters < 2
    assert simulation.peak_live < 3 * ZERO.max_live_parameters


def test_zero_settings_default_to_deepspeed_defaults() -> None:
    deepspeed = DeepSpeedZeroConfig(stage=3)
    defaults = {key: int(getattr(deepspeed, key.removeprefix("stage3_"))) for key in DEEPSPEED_DEFAULTS}
    assert defaults == DEEPSPEED_DEFAULTS
    settings = ZeroSettings.from_config({"zero_optimization": {"stage": 3}})
    assert settings.contiguous_gradients == deepspeed.contiguous_gradients
    assert settings.overlap_comm == deepspeed.overlap_comm
