"""Module names: none hides another package."""

import sys
from importlib.metadata import packages_distributions

from tests.runs import ROOT


def test_top_level_modules_shadow_no_package() -> None:
    """`deepspeed pipeline/train.py` puts pipeline/ first on the path; a module named like another would shadow it."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    modules = {path.stem for path in (ROOT / "pipeline").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & taken - {"__init__", "__pycache__"}
