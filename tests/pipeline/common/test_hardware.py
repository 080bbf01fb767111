"""Device files."""

from pathlib import Path

import pytest
import yaml

from pipeline.common.errors import UserError
from pipeline.common.hardware import FOLDER, device_called, load_device


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"memory_gib": None}, "'memory_gib' is missing"),
        ({"memory_gib": "80 GB"}, "memory_gib is '80 GB'"),
        ({"memory_gb": 80}, "did you mean 'memory_gib'"),
        ({"network_gb_s": 0}, "network_gb_s is 0"),
    ],
)
def test_load_device_refuses_invalid_file(change: dict, part: str, tmp_path: Path) -> None:
    tree = yaml.safe_load((FOLDER / "h100.yaml").read_text()) | change
    path = tmp_path / "gpu.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
    with pytest.raises(UserError) as caught:
        load_device(str(path))
    assert part in str(caught.value)


def test_device_called_finds_gpu_by_torch_name() -> None:
    device = device_called("NVIDIA H100 80GB HBM3")
    assert device is not None and device.flops("bf16") == 989e12
    assert device_called("Radeon") is None
