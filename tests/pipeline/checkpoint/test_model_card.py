"""Content of the model card."""

import dataclasses
from pathlib import Path

from pipeline.checkpoint.export_record import ExportRecord
from pipeline.checkpoint.model_card import write_model_card
from pipeline.config.settings import Config


def test_model_card_lists_metrics_of_model_only(tmp_path: Path) -> None:
    record = ExportRecord("runs/x", 6, "id", "fp32", "..", newest=True)
    state = {"languages": ["en"], "num_tokens": 9, "ranks": 1}
    metrics = {"step": 6, "ce_loss": 1.5, "ce_grad_norm": 0.5, "gradient_norms_seconds": 2.0, "step_seconds": 1.0}
    write_model_card(tmp_path, record, dataclasses.asdict(Config()), state, metrics)
    text = (tmp_path / "README.md").read_text()
    assert "| ce_loss | 1.5 |" in text and "| ce_grad_norm | 0.5 |" in text and "seconds |" not in text
