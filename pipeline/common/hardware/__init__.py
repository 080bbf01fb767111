"""GPUs and links, from YAML files: vendors' numbers, with their sources beside them, and what of them is reached."""

import difflib
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path

import yaml

from pipeline.common.errors import UserError

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Device:
    """One accelerator and its links; bandwidths in one direction, in GB/s (10^9 bytes).

    Attributes:
        name: part of what torch calls the device. memory_gib: GiB that a process can use.
        bf16_tflops, fp32_tflops: dense peak; fp16 counts as bf16.
        memory_gb_s: of its own memory. node_gb_s: to the GPUs of its node. network_gb_s: to other nodes. host_gb_s: to
            the host's memory. host_memory_gib: of a node, for what is offloaded.
        attention_copies_mask: sdpa turns the bool mask of packed rows into numbers in every layer.
        compute_efficiency: share of the peak that large matrix products reach.
        link_efficiency: share of the links' bandwidth that collectives reach.
        module_seconds: host time of one module's forward and backward under ZeRO-3's hooks; a GPU cannot be faster.
        hop_seconds: latency of one step of a ring; a collective's start is counted as some more.
        host_optimizer_gb_s: memory bandwidth of the host for one rank's optimizer, where it is offloaded.
        reserve_gib: kept free for the CUDA context, NCCL and the allocator.
    """

    name: str
    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    node_gb_s: float
    network_gb_s: float
    host_gb_s: float
    host_memory_gib: float
    attention_copies_mask: bool
    compute_efficiency: float = 0.7
    link_efficiency: float = 0.8
    module_seconds: float = 2e-3
    hop_seconds: float = 3e-6
    host_optimizer_gb_s: float = 20.0
    reserve_gib: float = 4.0

    def flops(self, precision: str) -> float:
        """Dense peak, FLOP/s."""
        return (self.fp32_tflops if precision == "fp32" else self.bf16_tflops) * 1e12


def load_device(name: str) -> Device:
    """`h100`, or the path of a YAML file with the fields of Device.

    Raises:
        UserError: no such GPU or file, an unknown or missing field, a value that is no positive number.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    path = FOLDER / f"{name.lower()}.yaml" if name.lower() in known else Path(name)
    if not path.is_file():
        raise UserError(f"--gpu {name}: no such file, and the known GPUs are {', '.join(known)}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a mapping of keys to values is wanted; see {FOLDER / 'h100.yaml'}")
    names = [f.name for f in fields(Device)]
    for key in tree:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            raise UserError(f"{path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    missing = [f.name for f in fields(Device) if f.name not in tree and f.default is MISSING]
    if missing:
        raise UserError(f"{path}: {missing[0]!r} is missing; see {FOLDER / 'h100.yaml'}")
    for key, value in tree.items():
        if key == "name":
            right, kind = isinstance(value, str), "text"
        elif key == "attention_copies_mask":
            right, kind = isinstance(value, bool), "true or false"
        else:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            right, kind = number and 0 < value < float("inf"), "a number greater than 0"
        if not right:
            raise UserError(f"{path}: {key} is {value!r}; it must be {kind}")
    return Device(**tree)


@cache
def device_called(torch_name: str) -> Device | None:
    """The known GPU whose name is part of torch's name for it."""
    devices = [load_device(path.stem) for path in sorted(FOLDER.glob("*.yaml"))]
    return next((device for device in devices if device.name in torch_name), None)
