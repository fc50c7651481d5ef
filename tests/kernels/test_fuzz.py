"""A few random calls of every public function; tests/soak/test_fuzz.py makes ten thousand. See tests/fuzz/calls.py."""

import dataclasses

import pytest
import torch

import mmmae_kernels
from tests.fuzz.calls import Failure, as_under_autocast, check_right_call, check_wrong_call, failures
from tests.fuzz.draw import Draw
from tests.fuzz.ops import OPS

CALLS = 20  # of each function, right and wrong


@pytest.mark.parametrize("name", OPS)
def test_right_calls_agree_with_the_definition_in_float64(name):
    assert failures(check_right_call, name, range(CALLS)) == []


@pytest.mark.parametrize("name", OPS)
def test_nonsense_is_a_value_error_that_names_the_argument(name):
    assert failures(check_wrong_call, name, range(CALLS)) == []


def test_every_public_function_is_called():
    others = {"BlockWeights", "TokenMask", "use_backend", "explain"}
    assert set(mmmae_kernels.__all__) - others <= set(OPS)


def test_each_kind_of_call_is_served_by_the_backends_at_hand():
    """Most calls are of float32, which all backends take; a fuzz that none takes would find nothing."""
    for name in OPS:
        assert sum(check_right_call(name, seed) for seed in range(CALLS)) >= 1.2 * CALLS, name


def test_a_wrong_result_is_found_and_says_how_to_repeat_it(monkeypatch):
    op = OPS["gelu_linear"]

    def wrong(hidden, weight, bias, hidden_bias):
        return torch.nn.functional.linear(torch.nn.functional.gelu(hidden, approximate="tanh"), weight, bias)

    monkeypatch.setitem(OPS, "gelu_linear", dataclasses.replace(op, call=wrong))
    lines = failures(check_right_call, "gelu_linear", range(CALLS))
    assert len(lines) > CALLS / 4
    assert "; again: python -m tests.fuzz.calls gelu_linear " in lines[0]


def test_some_calls_are_made_under_autocast_and_a_wrong_dtype_is_found(monkeypatch):
    for name, op in OPS.items():
        halves = {as_under_autocast(op, op.draw(Draw(seed)), seed)[1] for seed in range(100)}
        assert name == "random_masking" or halves == {None, torch.float16, torch.bfloat16}, name

    def wrong(x, weight, bias):
        return torch.nn.functional.linear(x, weight, bias).to(x.dtype)

    monkeypatch.setitem(OPS, "linear", dataclasses.replace(OPS["linear"], call=wrong))
    lines = failures(check_right_call, "linear", range(CALLS))
    assert lines
    assert all("under autocast in torch." in line and "is torch.float32 [" in line for line in lines)


@pytest.mark.parametrize("error", [RuntimeError("dim"), ValueError("no"), TypeError("no"), None])
def test_an_error_that_names_no_argument_is_found(monkeypatch, error):
    op = OPS["linear"]

    def careless(**arguments):
        if error is not None:
            raise error

    monkeypatch.setitem(OPS, "linear", dataclasses.replace(op, call=careless))
    with pytest.raises(Failure, match=r"again: python -m tests\.fuzz\.calls linear 7 --wrong"):
        check_wrong_call("linear", 7)
