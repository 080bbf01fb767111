"""The installed package is the loss alone, under its own name."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.runs import ROOT

USE = """
import sys, torch
from solar_loss import LossBatch, alignment_sft_loss, target_tokens
labels = torch.tensor([-100, 1, 2, -100, 3])
positions, targets, lengths = target_tokens(labels, torch.tensor([3, 2]))
pivot, zeros = torch.tensor([0, 0]), torch.zeros(2, dtype=torch.int64)
hidden, head = torch.randn(5, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
loss, _ = alignment_sft_loss(hidden[positions], LossBatch(targets, lengths, pivot, zeros, zeros), head, head)
loss.backward()
assert head.grad.any() and hidden.grad.any()
assert not {"pipeline", "data_prep", "transformers"} & set(sys.modules), sys.modules
"""


def test_installed_package_is_the_loss_alone(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT / "pipeline" / "loss", source / "pipeline" / "loss")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    interpreter = Path(sys.prefix) / "bin" / "python"  # sys.executable is a fork, see tests/fork_server.py
    pip = [interpreter, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-compile"]
    subprocess.run([*pip, "--target", target, source], check=True, timeout=120)
    assert sorted(path.name for path in target.iterdir() if path.suffix != ".dist-info") == ["solar_loss"]
    environment = {"PYTHONPATH": str(target)}
    subprocess.run([interpreter, "-c", USE], cwd=tmp_path, env=environment, check=True, timeout=120)
