"""What the engine imports, and the gradient norm that it reports."""

import math
from types import SimpleNamespace

import pytest

from pipeline.zero3.engine import ZeroEngine
from pipeline.zero3.initialize import import_muon_uncompiled


@pytest.mark.parametrize(("reported", "norm"), [(None, None), (math.inf, None), (0.5, 0.5)])
def test_grad_norm_is_none_after_overflow(reported: float | None, norm: float | None) -> None:
    engine = object.__new__(ZeroEngine)  # DeepSpeed reports inf after an overflow
    engine.ds_engine = SimpleNamespace(get_global_grad_norm=lambda: reported)
    assert engine.grad_norm() == norm


def test_muon_is_imported_without_compiling_its_kernels() -> None:
    import_muon_uncompiled()
    from deepspeed.runtime.zero.muon import original_muon

    kernels = [original_muon.muon_update, original_muon.zeropower_via_newtonschulz5]
    assert not [kernel for kernel in kernels if hasattr(kernel, "_torchdynamo_orig_callable")]
