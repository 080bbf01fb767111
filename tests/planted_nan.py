"""Train with a NaN planted in one gradient: run as each rank, in place of pipeline/train.py, by its test.

Rank 1's gradient of one decoder matrix is NaN from the last micro-step of the third step on (`always`, the first
argument) or in that micro-step only (`once`). Prints a hash of this rank's weights before that step's update and after
the run has stopped.
"""

import hashlib
import sys
from typing import Any

from pipeline import train
from pipeline.common import distributed
from pipeline.common.errors import exit_cleanly
from pipeline.fault_tolerance.signals import StopSignal
from pipeline.training import loop
from pipeline.zero3.engine import ZeroEngine

STEP, MICRO_STEPS = 3, 2


def weights(zero: ZeroEngine) -> str:
    digest = hashlib.sha256()
    for parameter in zero.ds_engine.module.parameters():
        digest.update(parameter.ds_tensor.numpy().tobytes())
    return digest.hexdigest()


def main() -> int:
    kind, *words = sys.argv[1:]
    build, original_train, engines = loop.setup_engine, loop.train, []

    def build_and_plant(*arguments: Any) -> ZeroEngine:
        zero = build(*arguments)
        engines.append(zero)
        calls = 0

        def spoil(gradient: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == STEP * MICRO_STEPS:
                print("weights before", weights(zero), flush=True)
            planted = calls == STEP * MICRO_STEPS or (calls > STEP * MICRO_STEPS and kind == "always")
            return gradient * float("nan") if planted and distributed.rank() == 1 else gradient

        _, parameter = next(p for p in zero.ds_engine.module.named_parameters() if "q_proj.weight" in p[0])
        parameter.register_hook(spoil)
        return zero

    def fit_and_tell(*arguments: Any) -> loop.RunEnd:
        try:
            return original_train(*arguments)
        finally:
            print("weights after", weights(engines[0]), flush=True)
            distributed.barrier()  # the first rank to end takes the others with it

    loop.setup_engine, loop.train = build_and_plant, fit_and_tell
    return train.main(words, StopSignal())


if __name__ == "__main__":
    exit_cleanly(main)
