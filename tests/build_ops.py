"""Build DeepSpeed's CPU Adam, which offloading uses, so that no test times out while the compiler runs."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

from deepspeed.accelerator import get_accelerator

get_accelerator().create_op_builder("CPUAdamBuilder").load(verbose=False)
