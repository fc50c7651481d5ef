"""Two ranks against one process with the joined batch: masks, losses and every gradient.

tests/soak/test_four_ranks.py does it with four ranks, and with compiled blocks and models.
"""

import pytest

from tests.training.ranks import Case, check, steps_of_ranks

pytestmark = pytest.mark.xdist_group("ranks")  # whose runs are made once
CASES = [
    Case("ddp"),
    Case("ddp", {"symmetric": True}),
    Case("ddp", {"decode_fraction": 0.5, "activation_checkpointing": True}),
    Case("fsdp"),
    Case("fsdp", {"decode_fraction": 0.5, "activation_checkpointing": True}),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return steps_of_ranks(2, CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_equal_one_process_with_the_joined_batch(case, answers):
    check(case, answers[str(case)])
