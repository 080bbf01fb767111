"""Compile the Triton kernels to machine code, without a GPU, and print the resources of each as JSON.

python -m tests.pipeline.loss.compiled_kernels
"""

import json
import re
import subprocess
from pathlib import Path
from tempfile import NamedTemporaryFile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pipeline.loss import triton_kernels, triton_softmax
from pipeline.loss.top_k import BLOCK

CAPABILITIES = {"A100": 80, "H100": 90}
POINTERS = {"log_sum_ptr": "fp32", "total_ptr": "fp32", "weight_ptr": "fp32", "edge_ptr": "i64", "pooled_ptr": "fp32"}
POINTERS |= {"reference_ptr": "fp32", "bound_ptr": "fp32", "left_ptr": "i16", "count_ptr": "i32"}
POINTERS |= {"ids_ptr": "i64", "grad_index_ptr": "i64", "inner_ptr": "fp32", "base_ptr": "fp32", "slope_ptr": "fp32"}
WARPS = {"_pool": 4, "_softmax": triton_softmax.SOFTMAX_WARPS, "_largest_logits": triton_softmax.SELECT_WARPS}
SELECTION = {"k": 20, "GROUPS": triton_softmax.MIN_GROUPS}
CONSTANTS = {
    "_softmax": {"SLACK": 40, "LINE": triton_softmax.LINE, "BLOCK": BLOCK} | SELECTION,
    "_pool": {"ROWS": triton_kernels.POOL_ROWS, "LINE": triton_kernels.POOL_LINE},
    "_largest_logits": {"k": 20, "AT_ONCE": triton_softmax.AT_ONCE, "K": 32, "BLOCK": BLOCK},
    "_inner_products": {"LINE": triton_kernels.LINE},
    "_softmax_backward": {"SAME": False, "LINE": triton_kernels.LINE},
}


def resources(name: str, capability: int) -> dict[str, int]:
    """Return the threads of a program, the registers of a thread and the bytes that it spills, for logits in bf16."""
    kernel = getattr(triton_softmax if hasattr(triton_softmax, name) else triton_kernels, name)
    signature, aligned = {}, {}
    for number, argument in enumerate(kernel.arg_names):
        if argument in CONSTANTS[name]:
            signature[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            signature[argument] = f"*{POINTERS.get(argument, 'bf16')}"
        else:
            signature[argument] = "fp32" if argument == "inverse_temperature" else "i32"
        if argument.endswith(("_ptr", "stride")):
            aligned[number,] = [["tt.divisibility", 16]]
    constants = {(kernel.arg_names.index(key),): value for key, value in CONSTANTS[name].items()}
    source = ASTSource(kernel, signature, constants, aligned)
    warps = WARPS.get(name, 8)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return found | {"threads": 32 * warps}


if __name__ == "__main__":
    results = {f"{name} {gpu}": resources(name, CAPABILITIES[gpu]) for gpu in CAPABILITIES for name in CONSTANTS}
    print(json.dumps(results))
