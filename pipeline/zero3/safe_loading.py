"""Load DeepSpeed's files without running code in them.

DeepSpeed 0.19 calls `torch.load` with weights_only=False. torch has a variable that overrides this.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

SAFE_CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum]  # of DeepSpeed, in the files that it saves
VARIABLE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def weights_only_loading() -> Iterator[None]:
    """Make every `torch.load` in the block accept tensors, plain values and `SAFE_CLASSES` only.

    Any other class makes it raise `pickle.UnpicklingError`.
    """
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1"
    try:
        with torch.serialization.safe_globals(SAFE_CLASSES):
            yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
