"""Attention over packed sequences on a GPU, against each sequence by itself in float64."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.models.packed_attention import SequenceGroups, packed_attention
from pipeline.models.solar_model import decoder_hidden_states
from tests.pipeline.models.test_models import batch
from tests.pipeline.models.test_packed_attention import attend_alone

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = [200, 3, 190, 90, 1, 65, 197]


@pytest.fixture
def sync_mode_restored() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gpu_packed_attention_matches_each_sequence_alone(
    dtype: torch.dtype, head_size: int, window: int | None
) -> None:
    """The errors of outputs and gradients stay within a few roundings of the data type."""
    torch.manual_seed(0)
    exact = [torch.randn(1, heads, sum(LENGTHS), head_size).to(dtype).double() for heads in (4, 2, 2)]
    exact = [x.requires_grad_() for x in exact]
    inputs = [x.detach().to("cuda", dtype).requires_grad_() for x in exact]
    boundaries = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    groups = SequenceGroups(LENGTHS, inputs[0].device)
    out, _ = packed_attention(nn.Module(), *inputs, None, 0.3, window, groups, boundaries, max(LENGTHS))
    expected = torch.cat(
        [attend_alone(*parts, window) for parts in zip(*(x.split(LENGTHS, 2) for x in exact), strict=True)], 1
    )
    bound = 8 * torch.finfo(dtype).eps
    assert relative_error(out, expected) < bound
    grad = torch.randn(expected.shape).to(dtype).double()
    got, wanted = torch.autograd.grad(out, inputs, grad.to("cuda", dtype)), torch.autograd.grad(expected, exact, grad)
    errors = [relative_error(x, y) for x, y in zip(got, wanted, strict=True)]
    assert max(errors) < bound, errors


def test_gpu_packed_attention_with_smaller_values() -> None:
    """The values of multi-head latent attention have fewer elements than its queries and keys."""
    torch.manual_seed(0)
    exact = [torch.randn(1, 4, sum(LENGTHS), size).bfloat16().double() for size in (96, 96, 64)]
    inputs = [x.to("cuda", torch.bfloat16) for x in exact]
    boundaries = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    groups = SequenceGroups(LENGTHS, inputs[0].device)
    out, _ = packed_attention(nn.Module(), *inputs, None, 0.3, None, groups, boundaries, max(LENGTHS))
    parts = zip(*(x.split(LENGTHS, 2) for x in exact), strict=True)
    expected = torch.cat([attend_alone(*part, None) for part in parts], 1)
    assert out.shape == expected.shape and relative_error(out, expected) < 8 * torch.finfo(torch.bfloat16).eps


def test_gpu_decoder_does_not_synchronize(sync_mode_restored: None) -> None:
    """In this mode, torch raises an error if the host waits for the device."""
    fields = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = AutoConfig.for_model("qwen3", **fields, **heads)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="solar_packed", dtype=torch.bfloat16).cuda()
    micro = batch().to(torch.device("cuda"))
    embeddings = model.get_input_embeddings()(micro.input_ids)
    decoder_hidden_states(model, embeddings, micro)  # the first call may build or load kernels
    torch.cuda.set_sync_debug_mode("error")
    decoder_hidden_states(model, embeddings, micro).float().square().sum().backward()
