"""Content of the model card."""

import dataclasses
from pathlib import Path

from pipeline.checkpoint.export_record import ExportRecord
from pipeline.checkpoint.model_card import hub_languages, write_model_card
from pipeline.config.settings import Config


def test_model_card_lists_metrics_of_model_only(tmp_path: Path) -> None:
    record = ExportRecord("runs/x", 6, "id", "fp32", "..", newest=True)
    state = {"languages": ["en"], "num_tokens": 9, "ranks": 1}
    metrics = {"step": 6, "ce_loss": 1.5, "ce_grad_norm": 0.5, "gradient_norms_seconds": 2.0, "step_seconds": 1.0}
    write_model_card(tmp_path, record, dataclasses.asdict(Config()), state, metrics)
    text = (tmp_path / "README.md").read_text()
    assert "| ce_loss | 1.5 |" in text and "| ce_grad_norm | 0.5 |" in text and "seconds |" not in text


def test_model_card_describes_alignment(tmp_path: Path) -> None:
    record = ExportRecord("runs/x", 6, "id", "fp32", "..", newest=True)
    state = {"languages": ["eng_Latn", "swh_Latn", "zh-Hant", "zh-Hans"], "num_tokens": 9, "ranks": 1}
    for changes, sentence, tag in (
        ({}, "the distance between the mean soft tokens of parallel answers ([SOLAR]", "solar"),
        ({"pooling_tokens": "hard"}, "the distance between the mean embeddings of the tokens", "alignment"),
        (
            {"pooling_tokens": "hidden_states", "distance": "infonce"},
            "a contrastive loss between the mean hidden states of a middle layer",
            "alignment",
        ),
        ({"alignment_weight": 0.0}, "It minimizes cross entropy alone.", "sft"),
    ):
        recipe = dataclasses.asdict(Config())
        recipe["loss"] |= changes
        write_model_card(tmp_path, record, recipe, state, {})
        text = (tmp_path / "README.md").read_text()
        assert sentence in text and f"- {tag}\n" in text
        assert "- eng\n- swh\n- zh\n" in text


def test_hub_languages_leaves_out_what_is_no_language() -> None:
    assert hub_languages(["pivot", "sw", "EN-us"]) == ["sw", "en"]
