"""A model with code of its own, for `trust_remote_code`."""

import json
from pathlib import Path

from tests.runs import TINY

CONFIG_CODE = "from transformers import Qwen2Config\nclass OwnConfig(Qwen2Config):\n    pass\n"
MODEL_CODE = """from transformers import Qwen2ForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(Qwen2ForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


def write_model_with_code(directory: Path) -> None:
    """Write the configuration of a model and its code."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**TINY, "vocab_size": 61, "auto_map": AUTO_MAP}))
    (directory / "configuration_own.py").write_text(CONFIG_CODE)
    (directory / "modeling_own.py").write_text(MODEL_CODE)
