"""Detection of a jump of the loss; test_loop.py has runs that stop for non-finite values."""

import pytest

from pipeline.common.errors import LossError
from pipeline.training.nonfinite import check_loss_jump


def test_check_loss_jump_compares_with_median() -> None:
    recent = [1.0, 3.0] * 10
    check_loss_jump(4.9, recent, 21, 3.0)
    with pytest.raises(LossError, match=r"step 21: the cross entropy jumped to 5.100 from a median of 2.000"):
        check_loss_jump(5.1, recent, 21, 3.0)


def test_check_loss_jump_disabled_or_too_early() -> None:
    check_loss_jump(50.0, [1.0] * 20, 21, None)
    check_loss_jump(50.0, [1.0] * 3, 4, 3.0)
