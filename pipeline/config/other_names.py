"""What an unknown key of a recipe may have meant: a setting of another library, or a misspelled one."""

import difflib
from collections.abc import Iterable

OTHER_NAMES = {  # names in Hugging Face's and TRL's trainers, peft and DeepSpeed that differ from those of a recipe
    "bf16": "training.precision",
    "ddp_timeout": "training.hang_timeout_s",
    "eval_strategy": "training.eval_steps",
    "fp16": "training.precision",
    "gradient_accumulation_steps": "training.train_batch_size",
    "gradient_checkpointing": "model.activation_checkpointing",
    "gradient_clipping": "training.max_grad_norm",
    "lora_r": "model.adapter.r",
    "model_name_or_path": "model.path",
    "per_device_train_batch_size": "training.train_micro_batch_size_per_gpu",
    "save_strategy": "training.save_steps",
    "warmup_steps": "training.warmup_ratio",
}


def meant_by(name: str, known: Iterable[str]) -> str | None:
    """Return the setting that an unknown key most likely means, or None if none is near.

    Args:
        name: The unknown key, with the sections that it was given in.
        known: All keys and sections of a recipe.
    """
    last = name.rpartition(".")[2]
    if last in OTHER_NAMES:
        return OTHER_NAMES[last]
    others = [key for key in known if not name.startswith(f"{key}.")]  # not the section that the key was given in
    in_another_section = [key for key in others if key.rpartition(".")[2] == last]
    near = in_another_section or difflib.get_close_matches(name, others, n=1)
    return near[0] if near else None
