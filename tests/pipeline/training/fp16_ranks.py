"""Train in fp16 on CPU ranks: run as each rank, in place of pipeline/train.py. Not a test.

pipeline/train.py refuses fp16 without a GPU, because few CPUs compute in it fast. The first argument is `plain`,
`gradients` to make rank 1's gradient of one decoder matrix NaN in every step, or `states` to make its hidden states
NaN in every second micro-step.
"""

import itertools
import math
import sys
from typing import Any

from deepspeed.accelerator import get_accelerator

from pipeline import train
from pipeline.common import distributed
from pipeline.common.errors import exit_cleanly
from pipeline.fault_tolerance.signals import StopSignal
from pipeline.training import loop, start
from pipeline.zero3 import ds_config
from pipeline.zero3.engine import ZeroEngine


def main() -> int:
    kind, *words = sys.argv[1:]
    complete, build = ds_config.deepspeed_config, loop.setup_engine

    def complete_for_gpu(*arguments: Any, **options: Any) -> dict[str, Any]:
        return complete(*arguments, **options, device="cuda")

    def build_and_plant(*arguments: Any) -> ZeroEngine:
        zero = build(*arguments)
        module, calls = zero.ds_engine.module, itertools.count(1)
        _, parameter = next(p for p in module.named_parameters() if "q_proj.weight" in p[0])
        if kind == "gradients" and distributed.rank() == 1:
            parameter.register_hook(lambda gradient: gradient * math.nan)
        if kind == "states" and distributed.rank() == 1:
            norm = module.model.get_decoder().norm
            norm.register_forward_hook(lambda *words: words[-1] * (math.nan if next(calls) % 2 == 0 else 1))
        return zero

    get_accelerator().is_fp16_supported = lambda: True
    ds_config.deepspeed_config = start.deepspeed_config = complete_for_gpu
    loop.setup_engine = build_and_plant
    return train.main(words, StopSignal())


if __name__ == "__main__":
    exit_cleanly(main)
