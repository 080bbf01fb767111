"""Read per-token weights from safetensors files."""

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.common.errors import UserError


def load_token_table(path: str | None, vocab_size: int, key: str) -> Tensor | None:
    """[V] fp32 `weights` of a safetensors file, for the setting `key`.

    Raises:
        UserError: unreadable, another shape, negative or not finite.
    """
    if path is None:
        return None
    try:
        weights = load_file(path)["weights"].float()
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{path}: {key} needs a safetensors file with a tensor 'weights' ({error})") from error
    if weights.shape != (vocab_size,):
        raise UserError(f"{path}: {key} has shape {tuple(weights.shape)}, the vocabulary has {vocab_size} entries")
    if not bool((weights >= 0).all()) or not bool(weights.isfinite().all()):
        raise UserError(f"{path}: {key} must be finite and not negative")
    return weights
