"""Compare the dense soft tokens with their definition."""

import math

import torch

from pipeline.loss.soft_tokens import head_logits, mean_soft_tokens, soft_token_probabilities, soft_tokens

T, V, D = 7, 11, 5


def draw(*shape: int) -> torch.Tensor:
    """Draw a float64 tensor, seeded by its shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_head_logits_with_scale_bias_and_softcap() -> None:
    hidden, head, bias = draw(T, D), draw(V, D), draw(V)
    expected = 3.0 * torch.tanh((0.5 * torch.einsum("td,vd->tv", hidden, head) + bias) / 3.0)
    torch.testing.assert_close(head_logits(hidden, head, bias, 0.5, 3.0), expected)
    assert head_logits(hidden, head, dtype=torch.float32).dtype == torch.float32


def test_soft_tokens_with_temperature_and_weights() -> None:
    logits, embedding, weights = draw(T, V), draw(V, D), draw(V).abs()
    p = (logits / 0.7).exp()
    p = p / p.sum(1, keepdim=True)
    expected = torch.einsum("tv,v,vd->td", p, weights, embedding)
    torch.testing.assert_close(soft_tokens(logits, embedding, 0.7, weights), expected)


def test_soft_token_probabilities_of_top_k_prefer_lower_ids() -> None:
    q = soft_token_probabilities(torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]]).double(), 0.5, top_k=3)
    first, last = 1 / (2 + math.e**-2), math.e**-2 / (2 + math.e**-2)
    torch.testing.assert_close(q, torch.tensor([[0.0, first, last, first, 0.0, 0.0]]).double())


def test_mean_soft_tokens_equals_mean_of_soft_tokens() -> None:
    logits, embedding, sequence = draw(T, V).float(), draw(V, D).float(), torch.tensor([0, 0, 0, 2, 2, 1, 1])
    s = soft_tokens(logits, embedding)
    expected = torch.stack([s[sequence == i].mean(0) for i in range(3)])
    torch.testing.assert_close(mean_soft_tokens(logits.split(2), sequence, 3, embedding, 4), expected)
