"""Run the Triton kernels on a CPU with Triton's interpreter, and compare the loss with the float64 reference.

The tests in `test_gpu` need a GPU. These make few calls, because the interpreter takes milliseconds for a row.
"""

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pipeline.loss import kernels
from pipeline.loss.top_k import BLOCK
from tests.pipeline.loss.cases import Case
from tests.pipeline.loss.test_gpu import (
    check,
    check_largest_logits,
    check_selection_after_larger_logits,
    check_selection_from_nonfinite_logits,
    check_softmax_of_sorted_logits,
)
from tests.pipeline.loss.test_vocab_parallel import EMPTY_SEQUENCES, SETTINGS, UNEVEN

pytestmark = [
    pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="test_gpu runs the compiled kernels"),
    pytest.mark.skipif(not find_spec("triton"), reason="needs Triton"),
]


@pytest.fixture(autouse=True)
def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all functions of `kernels` call the Triton kernels."""
    for name in ("triton_kernels", "triton_softmax"):
        monkeypatch.setattr(kernels, name, importlib.import_module(f"pipeline.loss.{name}"), raising=False)
    monkeypatch.setattr(kernels, "_use_triton", lambda z: z.dtype != torch.float64 and z.numel() > 0)


def test_kernels_compile_without_spilled_registers(tmp_path: Path) -> None:
    """Compile for an A100 and an H100. The registers of an SM must be enough for two programs."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [Path(sys.prefix) / "bin/python", "-m", "tests.pipeline.loss.compiled_kernels"]
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for name, resources in json.loads(done.stdout).items():
        assert resources["STACK"] == resources["LOCAL"] == 0, (name, resources)
        assert 0 < 2 * resources["REG"] * resources["threads"] <= 65536, (name, resources)


@pytest.mark.parametrize("name", SETTINGS)
def test_interpreted_loss_settings(name: str) -> None:
    check(Case(UNEVEN[:1], SETTINGS[name], tied=False))


def test_interpreted_loss_with_selection_by_kernel() -> None:
    """Use enough columns for the kernel that selects the largest logits."""
    check(Case(EMPTY_SEQUENCES[:1], vocab_size=1187, padded_size=1187))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("k", [0, 20])
def test_interpreted_softmax_of_sorted_logits(k: int, dtype: torch.dtype, direction: int) -> None:
    check_softmax_of_sorted_logits(dtype, direction, "cpu", k)


@pytest.mark.parametrize(("columns", "k"), [(6 * BLOCK, 6), (1187, 6), (9000, 64)])
@pytest.mark.parametrize("distinct", [1, 3, 100_000])
def test_interpreted_largest_logits_equal_stable_sort(columns: int, k: int, distinct: int) -> None:
    check_largest_logits(torch.bfloat16, columns, distinct, k, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_interpreted_largest_logits_in_other_dtypes(dtype: torch.dtype) -> None:
    """In fp32, hardly any of the largest logits are equal, so the k-th largest block must be left exactly."""
    check_largest_logits(dtype, 1187, 100_000, 6, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpreted_selection_after_larger_logits(dtype: torch.dtype) -> None:
    check_selection_after_larger_logits(dtype, "cpu")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_interpreted_selection_from_nonfinite_logits() -> None:
    check_selection_from_nonfinite_logits("cpu")
