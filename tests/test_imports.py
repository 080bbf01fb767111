"""Import each command with no other module of the project imported, as a new interpreter does."""

import importlib
import subprocess
import sys
from pathlib import Path

from tests.runs import ROOT, python

# Commands that answer --help and invalid options without the imports of torch and transformers, which take seconds.
FAST = (
    "data_prep.__main__",
    "pipeline.compare",
    "pipeline.plan.__main__",
    "pipeline.power",
    "pipeline.status",
    "pipeline.study.__main__",
)
PACKAGES = ("pipeline", "data_prep")


def import_alone() -> None:
    """Import each command after removing the project's modules. Run in a process of its own."""
    for path in sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        if '__name__ == "__main__"' in path.read_text():
            for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
                del sys.modules[name]
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            importlib.import_module(name)
            print(name)


def test_commands_import_alone() -> None:
    result = python("-c", "from tests.test_imports import import_alone; import_alone()")
    assert result.returncode == 0, result.stderr
    assert {"pipeline.train", "pipeline.evaluation.__main__", "data_prep.__main__"} <= set(result.stdout.split())


def test_fast_commands_import_no_torch() -> None:
    check = f"import sys, {', '.join(FAST)}; sys.exit(' '.join({{'torch', 'transformers'}} & set(sys.modules)) or 0)"
    interpreter = Path(sys.prefix) / "bin" / "python"  # a new one: forks have imported everything
    result = subprocess.run([interpreter, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
