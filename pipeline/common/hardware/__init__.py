"""Specifications of GPUs and their links, loaded from YAML files that cite the vendors' data sheets."""

import difflib
import re
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path

import yaml

from pipeline.common.errors import UserError

FOLDER = Path(__file__).resolve().parent
# In the name of a slice or another version of a GPU, whose speeds or links differ from those of its data sheet here.
OTHER_VERSIONS = re.compile(r"\b(MIG|PCIe|NVL|Laptop|RTX 4090 D)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Device:
    """One accelerator and its links. Bandwidths are per direction, in GB/s (10^9 bytes).

    Attributes:
        name: a word or words of torch's device name.
        memory_gib: GiB that a process can use.
        bf16_tflops: dense peak in bf16 and fp16.
        fp32_tflops: dense peak in fp32.
        memory_gb_s: memory bandwidth.
        node_gb_s: bandwidth to other GPUs of the same node.
        network_gb_s: bandwidth to other nodes.
        host_gb_s: bandwidth to CPU memory.
        host_memory_gib: CPU memory of a node, for offloading.
        host_memory_gb_s: bandwidth of a node's CPU memory, of which an offloaded optimizer reaches half.
        attention_copies_mask: whether sdpa converts the boolean mask of packed rows to a floating-point mask in every
            layer.
        compute_efficiency: fraction of the peak that large matrix products reach.
        link_efficiency: fraction of the link bandwidth that collectives reach.
        layer_seconds: host time of a decoder layer's forward and backward under ZeRO-3. On a GPU, a layer takes at
            least this long, plus `module_seconds` for each of its modules. The defaults are fitted to recipes measured
            on an H100 (docs/scaling.md).
        module_seconds: host time of each module with parameters in a decoder layer.
        hop_seconds: latency of one hop of a ring.
        reserve_gib: memory set aside for the CUDA context, NCCL and the allocator.
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
    host_memory_gb_s: float
    attention_copies_mask: bool
    compute_efficiency: float = 0.7
    link_efficiency: float = 0.8
    layer_seconds: float = 6.5e-3
    module_seconds: float = 0.26e-3
    hop_seconds: float = 3e-6
    reserve_gib: float = 4.0

    def flops(self, precision: str) -> float:
        """Return the dense peak FLOP/s for a precision."""
        return (self.fp32_tflops if precision == "fp32" else self.bf16_tflops) * 1e12


def load_device(name: str) -> Device:
    """Load a known GPU such as `h100`, or a YAML file with the fields of Device.

    Raises:
        UserError: no such GPU or file, an unknown or missing key, or an invalid value.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    path = FOLDER / f"{name.lower()}.yaml" if name.lower() in known else Path(name)
    if not path.is_file():
        raise UserError(f"--gpu {name}: no such file; the known GPUs are {', '.join(known)}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: not a mapping of keys to values; see {FOLDER / 'h100.yaml'}")
    _check_fields(path, tree)
    return Device(**tree)


def _check_fields(path: Path, tree: dict) -> None:
    """Check the keys and values of a device file."""
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
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            valid, kind = is_number and 0 < value < float("inf"), "a number greater than 0"
        if not valid:
            raise UserError(f"{path}: {key} is {value!r}; it must be {kind}")


@cache
def device_called(torch_name: str) -> Device | None:
    """Return the known GPU with this name in torch, or None."""
    if OTHER_VERSIONS.search(torch_name):
        return None
    devices = [load_device(path.stem) for path in sorted(FOLDER.glob("*.yaml"))]
    return next((device for device in devices if re.search(rf"\b{device.name}\b", torch_name)), None)
