"""Attention over packed sequences, against each sequence by itself."""

from inspect import signature

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.modeling_flash_attention_utils import _flash_attention_forward

from pipeline.common.errors import UserError
from pipeline.models.packed_attention import (
    PADDING_FRACTION,
    SequenceGroups,
    packed_attention,
    resolve_attention,
    sequence_arguments,
)
from tests.pipeline.models.test_models import batch

CPU = torch.device("cpu")


def attend_alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None) -> torch.Tensor:
    """Compute the attention of one sequence by its definition: [1, H, L, D] to [1, L, H, D]."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    distance = torch.arange(query.shape[2])[:, None] - torch.arange(query.shape[2])
    hidden = (distance < 0) | (distance >= (window or query.shape[2]))
    scores = (0.3 * query @ key.transpose(2, 3)).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("lengths", [[200, 3, 190, 90, 1, 65, 197], [32] * 4], ids=["uneven", "even"])
def test_packed_attention_matches_each_sequence_alone(lengths: list[int], window: int | None) -> None:
    torch.manual_seed(0)
    shape, tokens = (1, 4, sum(lengths), 8), sum(lengths)
    inputs = [torch.randn(1, heads, tokens, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    groups = SequenceGroups(lengths, CPU)
    assert (len(groups.members) > 2) == (len(set(lengths)) > 1)
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    out, _ = packed_attention(nn.Module(), *inputs, None, 0.3, window, groups, boundaries, max(lengths))
    alone = [attend_alone(*parts, window) for parts in zip(*(x.split(lengths, 2) for x in inputs), strict=True)]
    expected = torch.cat(alone, 1)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    grad = torch.randn(shape, dtype=torch.float64).transpose(1, 2)
    got, wanted = (torch.autograd.grad(y, inputs, grad) for y in (out, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_sequence_groups_bound_padding_and_calls() -> None:
    lengths = torch.randint(100, 2000, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = SequenceGroups(lengths, CPU)
    assert sorted(i for group in groups.members for i in group) == list(range(300))
    scores = sum(count * longest**2 for count, longest in groups.shapes)
    assert scores <= (1 + PADDING_FRACTION) * sum(n * n for n in lengths)
    assert len(groups.members) < 30


def test_packed_attention_needs_boundaries() -> None:
    with pytest.raises(ValueError, match="sequence boundaries"):
        packed_attention(nn.Module(), *[torch.zeros(1, 1, 2, 8)] * 3, None)


def test_sequence_arguments_reach_flash_attention() -> None:
    """transformers uses the boundaries without synchronization if it gets all four."""
    micro = batch()
    arguments = sequence_arguments(micro, "flash_attention_2")
    names = signature(_flash_attention_forward).parameters
    assert arguments.keys() == {name for name in names if name.startswith(("cu_seq_lens", "max_length"))}
    assert arguments["cu_seq_lens_q"].tolist() == [0, 5, 12, 16, 25, 26, 29, 32]
    assert arguments["max_length_k"] == 9


def test_resolve_attention_by_model() -> None:
    plain = AutoConfig.for_model("qwen2")
    capped, dropout = AutoConfig.for_model("gemma2"), AutoConfig.for_model("granite", attention_dropout=0.1)
    assert [resolve_attention(None, c) for c in (plain, capped, dropout)] == ["solar_packed", "eager", "sdpa"]
    assert resolve_attention("kernels-community/flash-attn2", capped) == "kernels-community/flash-attn2"
    for config, reason in ((capped, "use 'eager'"), (dropout, "use 'sdpa'")):
        with pytest.raises(UserError, match=reason):
            resolve_attention("solar_packed", config)
    with pytest.raises(UserError, match="'flash' is unknown"):
        resolve_attention("flash", plain)
