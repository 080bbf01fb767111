"""Checks of a recipe against its data, model and ranks."""

import pytest

from pipeline.common.errors import AgreedError
from pipeline.data.loader import BatchSplit
from pipeline.training.rank_checks import check_process_group


def test_check_process_group_refuses_other_rank() -> None:
    check_process_group(BatchSplit(8, 1, rank=0, world_size=1))
    with pytest.raises(AgreedError, match="rank 0 of 1 reads data as rank 1 of 2"):
        check_process_group(BatchSplit(8, 1, rank=1, world_size=2))
