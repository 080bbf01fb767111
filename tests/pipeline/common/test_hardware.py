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


@pytest.mark.parametrize(
    "name",
    [
        *("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GB200"),
        *("NVIDIA A100-PCIE-40GB", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"),
    ],
)
def test_device_called_does_not_take_other_versions_for_a_known_gpu(name: str) -> None:
    assert device_called(name) is None


@pytest.mark.parametrize(
    ("name", "known"),
    [("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA B200", "B200")],
)
def test_device_called_finds_versions_of_the_data_sheets(name: str, known: str) -> None:
    device = device_called(name)
    assert device is not None and device.name == known
