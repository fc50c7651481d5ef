"""Ten thousand random calls, with other seeds than the default tests', see tests/fuzz/calls.py."""

import pytest

from tests.fuzz.calls import check_right_call, check_wrong_call, failures
from tests.fuzz.ops import OPS

CALLS = 10_000 // (2 * len(OPS)) + 1


@pytest.mark.parametrize("name", OPS)
def test_right_calls_agree_with_the_definition_in_float64(name):
    assert failures(check_right_call, name, range(1000, 1000 + CALLS)) == []


@pytest.mark.parametrize("name", OPS)
def test_nonsense_is_a_value_error_that_names_the_argument(name):
    assert failures(check_wrong_call, name, range(1000, 1000 + CALLS)) == []
