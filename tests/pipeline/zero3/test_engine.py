"""What the engine imports."""

from pipeline.zero3.initialize import import_muon_uncompiled


def test_muon_is_imported_without_compiling_its_kernels() -> None:
    import_muon_uncompiled()
    from deepspeed.runtime.zero.muon import original_muon

    kernels = [original_muon.muon_update, original_muon.zeropower_via_newtonschulz5]
    assert not [kernel for kernel in kernels if hasattr(kernel, "_torchdynamo_orig_callable")]
