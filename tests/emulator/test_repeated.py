"""A launch is executed once: later ones with the same code on the same bytes get what it left."""

import pytest
import torch

from tests.emulator import repeated
from tests.emulator.repeated import Repeated

PTX = ".version 8.7\n.target sm_80\n.visible .entry double()"


@pytest.fixture
def executed():
    return []


def run(known, executed, x, *, ptx=PTX, n=4, grid=(1,)):
    """Double `x` by a launch, and note that it was executed."""
    known.run(ptx, grid, {"x_ptr": x, "n": n}, lambda: (executed.append(1), x.mul_(2)))


def test_what_was_executed_is_not_executed_again(executed):
    known = Repeated()
    x, y = torch.arange(4.0), torch.arange(4.0)
    run(known, executed, x)
    run(known, executed, y, ptx=PTX.replace("sm_80", "sm_86"))
    assert executed == [1]
    assert x.tolist() == y.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize(
    "change", [{"ptx": PTX + "{ ret; }"}, {"n": 3}, {"grid": (2,)}, {"x": torch.ones(4)}, {"x": torch.arange(5.0)[:4]}]
)
def test_what_differs_is_executed(executed, change):
    known = Repeated()
    run(known, executed, torch.arange(4.0))
    run(known, executed, **{"x": torch.arange(4.0), **change})
    assert executed == [1, 1]


def test_it_matters_which_tensors_share_memory(executed):
    known = Repeated()
    x = torch.zeros(8)
    for first, second in ((x[:4], x[4:]), (x[4:], x[:4]), (x[:4], x.clone()[4:])):
        known.run(PTX, (1,), {"a_ptr": first, "b_ptr": second}, lambda: executed.append(1))
    assert executed == [1, 1, 1]


def test_the_oldest_results_make_room(executed, monkeypatch):
    monkeypatch.setattr(repeated, "_MOST_BYTES", 40)
    known = Repeated()
    for value in (1.0, 2.0, 3.0, 3.0, 1.0):
        run(known, executed, torch.full((4,), value))
    assert executed == [1] * 4
    run(known, executed, torch.ones(16))  # more than is looked up
    run(known, executed, torch.ones(16))
    assert executed == [1] * 6
