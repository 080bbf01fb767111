"""Write the configuration of an exported model."""

import shutil
from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from pipeline.config.settings import ModelSettings
from pipeline.models.loading import has_own_code
from pipeline.models.multimodal import model_directory


def write_config(config: PreTrainedConfig, settings: ModelSettings, directory: Path) -> None:
    """Write the configuration of a model, and the code of its repository if the run has used it.

    Otherwise the export has no code, and its configuration must not name any.

    Raises:
        UserError: The model that was trained is not there any more.
    """
    if not has_own_code(config) and hasattr(config, "auto_map"):
        del config.auto_map
    if not config.architectures and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:  # vLLM requires them
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    config.save_pretrained(directory)
    if has_own_code(config) and settings.path is not None:
        for file in model_directory(settings.path).glob("*.py"):
            shutil.copyfile(file, directory / file.name)
