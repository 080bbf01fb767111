"""Steps around `deepspeed.initialize`."""

import importlib
import os
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig


def build_partitioned(ds: dict[str, Any], build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Call `build` so that transformers partitions each parameter over the ranks as soon as it is created."""
    # transformers enters deepspeed.zero.Init while an object of this class is alive.
    alive = HfDeepSpeedConfig(ds)
    model = build()
    del alive
    return model


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon optimizer without compiling its kernels.

    `deepspeed.initialize` imports it whatever the optimizer is. Its `torch.compile` decorators import Inductor, which
    would take about three seconds of every start.
    """
    previous = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        if previous is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = previous
