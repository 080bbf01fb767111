"""Seeded sampling of responses: one random stream per response, whatever batch or rank it is in.

Shape letters: B sequences of a batch, T maximum number of new tokens, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper


class Sampling(NamedTuple):
    """How to sample the responses of a list of prompts.

    Attributes:
        temperature: factor by which the logits are divided; above 0.
        top_p: sample from the most probable tokens that have this probability together.
        seeds: one random seed per prompt.
    """

    temperature: float
    top_p: float
    seeds: Sequence[int]


def response_seed(seed: int, pair_id: str, lang: str, sample: int) -> int:
    """Return the random seed of a response, in [0, 2^31).

    It depends neither on the other examples nor on the number of samples, and the responses of two runs with different
    seeds are independent.
    """
    digest = hashlib.sha256(f"{seed}\0{pair_id}\0{lang}\0{sample}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4]) >> 1


def sampling_processors(
    temperature: float, top_p: float, seeds: Sequence[int], prompt_length: int, max_new_tokens: int
) -> LogitsProcessorList:
    """Return logits processors that make greedy decoding sample the sequences of a batch.

    Args:
        temperature: see `Sampling`.
        top_p: see `Sampling`.
        seeds: the seed of each sequence.
        prompt_length: number of tokens of the padded prompts.
        max_new_tokens: maximum length of a response.
    """
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    processors.append(SeededSampler(seeds, prompt_length, max_new_tokens))
    return processors


class SeededSampler(LogitsProcessor):
    """Logits processor that leaves one token of each sequence, drawn by inversion of the distribution function.

    The random numbers of a sequence depend on its seed and position only. `generate()` with `do_sample` would draw them
    for the whole batch from one generator, so that a response would depend on the rest of its batch.
    """

    def __init__(self, seeds: Sequence[int], prompt_length: int, max_new_tokens: int) -> None:
        self._prompt_length = prompt_length
        uniform = [
            torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
        self._uniform = torch.stack(uniform)  # [B, T]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` [B, V] with -inf except at the drawn tokens.

        Args:
            input_ids: [B, padded prompt and the response so far].
            scores: [B, V] logits after temperature and top_p.
        """
        cumulative = scores.double().softmax(-1).cumsum(-1)  # float32 would shift the tail of a large vocabulary
        uniform = self._uniform[:, input_ids.shape[1] - self._prompt_length, None].to(scores.device)
        # The total may differ from 1 by rounding. A token without probability adds nothing, so it is never drawn.
        tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        tokens = tokens.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens, 0.0)
