"""Build the DeepSpeed ops that CPU ranks load, side by side: otherwise many tests wait for the compiler at once."""

import os
from concurrent.futures import ProcessPoolExecutor

OPS = ("ShareMemCommBuilder", "CPUAdamBuilder")


def build(name: str) -> None:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder(name).load(verbose=False)


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    with ProcessPoolExecutor() as pool:
        list(pool.map(build, OPS))
