"""Read per-token weights from safetensors files."""

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.common.errors import UserError


def load_token_weights(path: str | None, vocab_size: int, key: str) -> Tensor | None:
    """Read the fp32 tensor `weights` [V] of a safetensors file.

    Args:
        path: the safetensors file, or None.
        vocab_size: V, the expected number of vocabulary entries.
        key: configuration key of the file, for error messages.

    Returns:
        The weights, or None if `path` is None.

    Raises:
        UserError: the file is unreadable, or the tensor has the wrong shape or a negative or non-finite weight.
    """
    if path is None:
        return None
    try:
        weights = load_file(path)["weights"].float()
    except (OSError, KeyError, SafetensorError) as error:
        raise UserError(f"{path}: {key} needs a safetensors file with a tensor 'weights' ({error})") from error
    if weights.shape != (vocab_size,):
        raise UserError(f"{path}: {key} has shape {tuple(weights.shape)}, but the vocabulary has {vocab_size} entries")
    if not bool((weights >= 0).all()) or not bool(weights.isfinite().all()):
        raise UserError(f"{path}: {key} must be finite and not negative")
    return weights
