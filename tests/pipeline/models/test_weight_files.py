"""Which file has a tensor of a model."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.models.weight_files import file_of_tensors
from tests.runs import TINY


def test_file_of_tensors_of_sharded_and_whole_models(tmp_path: Path) -> None:
    """Other files of the directory do not count."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=61))
    for size in ("20KB", "1GB"):
        folder = tmp_path / size
        model.save_pretrained(folder, max_shard_size=size)
        expected = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                expected |= dict.fromkeys(tensors.keys(), file)
        save_file({"norm.weight": torch.ones(2)}, folder / "consolidated.safetensors")
        assert len(set(expected.values())) == 1 if size == "1GB" else len(set(expected.values())) > 2
        assert file_of_tensors(str(folder)) == expected
    (tmp_path / "empty").mkdir()
    assert file_of_tensors(str(tmp_path / "empty")) == {}
