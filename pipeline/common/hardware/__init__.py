"""GPU and link specifications, read from YAML files that cite the vendors' data sheets."""

import difflib
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path

import yaml

from pipeline.common.errors import UserError

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Device:
    """One accelerator and its links. Bandwidths are per direction, in GB/s (10^9 bytes per second).

    Attributes:
        name: Part of the name that torch reports for the device.
        memory_gib: Memory that a process can use, GiB.
        bf16_tflops: Dense peak in bf16 and fp16, TFLOP/s.
        fp32_tflops: Dense peak in fp32, TFLOP/s.
        memory_gb_s: Bandwidth of the device's own memory.
        node_gb_s: Bandwidth to the other GPUs of the node.
        network_gb_s: Bandwidth to other nodes.
        host_gb_s: Bandwidth to the host's memory.
        host_memory_gib: Memory of one node's host, available for offloaded state, GiB.
        attention_copies_mask: Whether sdpa converts the boolean mask of packed rows to floats in every layer.
        compute_efficiency: Fraction of the peak that large matrix products reach.
        link_efficiency: Fraction of the link bandwidth that collectives reach.
        module_seconds: Host time of one module's forward and backward under ZeRO-3's hooks, a lower bound of its time
            on the GPU.
        hop_seconds: Latency of one hop in a ring; starting a collective counts as a few more hops.
        host_optimizer_gb_s: Host memory bandwidth available to one rank's offloaded optimizer.
        reserve_gib: Memory reserved for the CUDA context, NCCL and allocator overhead, GiB.
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
        """Return the dense peak for a precision ("fp32", "bf16" or "fp16"), FLOP/s."""
        return (self.fp32_tflops if precision == "fp32" else self.bf16_tflops) * 1e12


def load_device(name: str) -> Device:
    """Load a known GPU such as "h100", or a YAML file with the fields of `Device`.

    Raises:
        UserError: There is no such GPU or file, a field is unknown or missing, or a value has the wrong type.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    path = FOLDER / f"{name.lower()}.yaml" if name.lower() in known else Path(name)
    if not path.is_file():
        raise UserError(f"--gpu {name}: no such file; known GPUs: {', '.join(known)}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: must be a mapping of keys to values; see {FOLDER / 'h100.yaml'}")
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
            valid, kind = isinstance(value, str), "text"
        elif key == "attention_copies_mask":
            valid, kind = isinstance(value, bool), "true or false"
        else:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            valid, kind = number and 0 < value < float("inf"), "a number greater than 0"
        if not valid:
            raise UserError(f"{path}: {key} is {value!r}; it must be {kind}")
    return Device(**tree)


@cache
def device_called(torch_name: str) -> Device | None:
    """Return the known GPU whose name is part of the name torch reports, or None."""
    devices = [load_device(path.stem) for path in sorted(FOLDER.glob("*.yaml"))]
    return next((device for device in devices if device.name in torch_name), None)
