"""Train with a NaN planted in one gradient: `python -m tests.planted_nan --config RECIPE`, as each rank.

Rank 1's gradient of one decoder matrix is NaN from the third step on. Prints a hash of this rank's weights before that
step and after the run has stopped.
"""

import hashlib
from typing import Any

from data_prep.errors import exit_cleanly
from pipeline import dist, loop, train
from pipeline.zero import ZeroEngine

STEP, MICRO_STEPS = 3, 2


def weights(zero: ZeroEngine) -> str:
    digest = hashlib.sha256()
    for parameter in zero.engine.module.parameters():
        digest.update(parameter.ds_tensor.numpy().tobytes())
    return digest.hexdigest()


def main() -> int:
    build, engines = loop.build_engine, []

    def build_and_plant(*words: Any) -> ZeroEngine:
        zero = build(*words)
        engines.append(zero)
        calls = 0

        def spoil(gradient: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == STEP * MICRO_STEPS:
                print("weights before", weights(zero), flush=True)
            return gradient * float("nan") if calls >= STEP * MICRO_STEPS and dist.rank() == 1 else gradient

        _, parameter = next(p for p in zero.engine.module.named_parameters() if "q_proj.weight" in p[0])
        parameter.register_hook(spoil)
        return zero

    loop.build_engine = build_and_plant
    try:
        return train.run()
    finally:
        print("weights after", weights(engines[0]), flush=True)


if __name__ == "__main__":
    exit_cleanly(main)
