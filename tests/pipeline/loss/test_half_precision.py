"""Tests of the loss in half precision on a CPU. Those on a GPU are in test_gpu.py."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from pipeline.loss import LossSettings
from tests.pipeline.loss.cases import Case, errors, reference_results, sharded_results
from tests.pipeline.loss.test_vocab_parallel import UNEVEN


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_half_precision_with_few_used_rows_no_worse_than_dense(tied: bool, dtype: torch.dtype) -> None:
    """Pool target tokens, of which there are far fewer than vocabulary entries."""
    sharded, dense = Counter[str](), Counter[str]()
    for seed in range(6):
        settings = LossSettings(pooling_tokens="hard", alignment_weight=5.0)
        case = Case(UNEVEN[:1], settings, vocab_size=1000, padded_size=1000, hidden_size=32, tied=tied, dtype=dtype)
        case = replace(case, vocabulary_weights=True, seed=seed)
        expected = reference_results(case)
        sharded.update(errors(case, [sharded_results(None, case)], expected))
        dense.update(errors(case, [reference_results(case, dtype)], expected))
    assert all(sharded[name] <= 1.1 * dense[name] + 6e-4 for name in dense), (sharded, dense)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "settings", [LossSettings(top_k=20, detach=()), LossSettings(top_k=None)], ids=["top_k", "full"]
)
def test_fp16_holds_the_gradients_of_long_sequences(settings: LossSettings, tied: bool) -> None:
    """Pool 1,000 random tokens: pooled representations are short, so weight * gradient exceeds the range of fp16."""
    case = Case((((1000, 1000),),), settings, 5.0, 1000, 1000, 32, tied, torch.float16)
    expected = reference_results(case)
    sharded = errors(case, [sharded_results(None, case)], expected)
    dense = errors(case, [reference_results(case, torch.float16)], expected)
    assert sharded.pop("loss") < 1e-3  # that of the reference overflows
    assert {"hidden", "head", "embedding"} <= sharded.keys()
    assert all(error <= 1.1 * dense[name] + 6e-4 for name, error in sharded.items()), (sharded, dense)
