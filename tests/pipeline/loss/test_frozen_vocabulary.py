"""The loss with a frozen head and embedding, as an adapter trains on."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.loss import LossSettings
from tests.pipeline.loss.cases import Case, sharded_results
from tests.pipeline.loss.test_vocab_parallel import FULL, HEADS, UNEVEN, bound_of, check
from tests.workers import Workers


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_loss_with_frozen_vocabulary(workers: Workers, ranks: int, tied: bool) -> None:
    """Hidden states get the same gradient as from a trained vocabulary, also from the alignment loss."""
    for loss_settings in (LossSettings(), FULL, LossSettings(distance="infonce", detach=(), top_k=3)):
        for head in HEADS:
            case = Case(UNEVEN, replace(loss_settings, head=head), tied=tied, frozen=True)
            check(workers, ranks, case.with_rows(4), bound_of(case))


def test_frozen_head_saves_product_3() -> None:
    products = {}
    for frozen in (True, False):
        # In bf16, product 3 is not in place, and FlopCounterMode counts no product in place.
        case = Case(UNEVEN[:1], tied=False, dtype=torch.bfloat16, frozen=frozen)
        with FlopCounterMode(display=False) as counter:
            sharded_results(None, case)
        products[frozen] = counter.get_total_flops()
    tokens = sum(length for group in UNEVEN[0] for length in group)
    matrix = 2 * case.vocab_size * case.hidden_size
    assert products[False] - products[True] == matrix * tokens
    assert products[True] >= 2 * matrix * tokens
