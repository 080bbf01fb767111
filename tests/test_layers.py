"""Imports run downward only, read off the syntax trees."""

import ast
from pathlib import Path

import pytest

from tests.runs import ROOT

# Lower layers first; a module imports only from layers below its own, or from its own package.
LAYERS = [
    {"pipeline.loss", "pipeline.dist", "pipeline.answers", "pipeline.hardware", "pipeline.metrics_file"},
    {"pipeline.guard", "pipeline.config", "pipeline.problems", "pipeline.bench_peers"}
    | {"pipeline.drawing", "pipeline.extras", "pipeline.comparison"},
    {"pipeline.data", "pipeline.finished", "pipeline.scores", "pipeline.bench_loss"},
    {"pipeline.consistency", "pipeline.bench_common"},
    {"pipeline.model", "pipeline.metrics", "pipeline.evaluation", "pipeline.bench_ranks"},
    {"pipeline.prepare", "pipeline.bench_plain", "pipeline.status", "pipeline.ds_config", "pipeline.planning"}
    | {"pipeline.persistent"}
    | {"pipeline.representations", "pipeline.harness"},
    {"pipeline.zero", "pipeline.dry_run", "pipeline.writing", "pipeline.report", "pipeline.bench_calibrate"},
    {"pipeline.checkpoint"},
    {"pipeline.saving", "pipeline.universal"},
    {"pipeline.loop", "pipeline.export"},
    {
        "pipeline.train",
        "pipeline.demo",
        "pipeline.plan",
        "pipeline.bench_train",
        "pipeline.bench_plan",
        "pipeline.bench_scale",
        "pipeline.experiment",
    },
]
MODULES = sorted(path for folder in ("pipeline", "data_prep") for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """pipeline/loss/chunk.py -> pipeline.loss: the unit that has a layer."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:2])


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "pipeline" else {module}
    return found


def layer(name: str) -> int:
    for index, names in enumerate(LAYERS):
        if any(name == n or name.startswith(n + ".") for n in names):
            return index
    raise AssertionError(f"{name} has no layer: add it to LAYERS")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path: Path) -> None:
    own, used = name_of(path), imports(path)
    if own.startswith("data_prep"):
        assert not {n for n in used if n.split(".")[0] in ("pipeline", "torch", "deepspeed")}
        return
    if "deepspeed" in {n.split(".")[0] for n in used}:
        # Launchers, offline converters and benchmarks aside, one module knows DeepSpeed.
        assert own in (
            "pipeline.zero",
            "pipeline.export",
            "pipeline.bench_peers",
            "pipeline.bench_plain",
            "pipeline.persistent",
        )
    if own == "pipeline":
        return
    if own == "pipeline.loss":
        assert not {n for n in used if n.startswith("pipeline") and not n.startswith("pipeline.loss")}
        assert not {n for n in used if n.split(".")[0] in ("data_prep", "transformers", "deepspeed", "numpy")}
    for name in used:
        if name.startswith("pipeline.") and not name.startswith(own):
            assert layer(name) < layer(own), f"{own} imports {name}"


def test_no_module_hides_another_package() -> None:
    """`deepspeed pipeline/train.py` puts pipeline/ first on the path; a module named like another would shadow it."""
    import sys
    from importlib.metadata import packages_distributions

    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    assert not {path.stem for path in (ROOT / "pipeline").glob("*.py")} & taken - {"__init__"}
