"""Four ranks against one process with the joined batch, and blocks and whole models compiled."""

import pytest

from tests.training.ranks import Case, check, steps_of_ranks
from tests.training.test_distributed import CASES

FOUR = [*CASES, Case("ddp", compiled="blocks"), Case("fsdp", compiled="blocks")]
WHOLE = Case("ddp", compiled="whole")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return steps_of_ranks(4, FOUR, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", FOUR, ids=str)
def test_four_ranks_equal_one_process_with_the_joined_batch(case, answers):
    check(case, answers[str(case)])


def test_a_whole_compiled_model_is_equal_under_ddp(tmp_path):
    check(WHOLE, steps_of_ranks(2, [WHOLE], tmp_path)[str(WHOLE)])
