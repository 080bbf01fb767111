"""Tests of the loss profile on a small input."""

import sys

import pytest

from pipeline.benchmarks.loss_profile import added_milliseconds, main


def test_products_of_both_are_left_out() -> None:
    solar = {
        ("aten::mm", "large"): 90.0,
        ("aten::mm", "small"): 4.0,
        ("aten::topk", "a"): 3.0,
        ("aten::amax", "a"): 1.0,
    }
    ce_only = {("aten::mm", "large"): 100.0, ("aten::amax", "b"): 2.0}
    assert added_milliseconds(solar, ce_only) == {"aten::mm": 4.0, "aten::topk": 3.0, "aten::amax": -1.0}


def test_alignment_adds_a_selection(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tokens", "64", "--vocab", "2048", "--hidden", "16", "--sequence", "8", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["loss_profile", *sizes])
    main()
    products, ce_only, alignment, *operations = capsys.readouterr().out.splitlines()
    assert products.startswith("three products: ") and ce_only.startswith("CE only: ") and " of CE only" in alignment
    assert any("aten::topk" in line for line in operations)
