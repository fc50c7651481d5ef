"""Sums over many programs that end in the kernel that makes them, executed as compiled, and broken on purpose."""

from __future__ import annotations

import os
import re

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("TRITON_INTERPRET is set: there is no compiled code to execute", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")

from mmmae_kernels.add_layer_norm.gpu import add_layer_norm_backward, add_layer_norm_forward
from mmmae_kernels.gelu_linear.gpu import gelu_backward, gelu_forward
from mmmae_kernels.gpu.groups import GROUP, MOST_PROGRAMS
from tests.emulator.gpu import Emulator, emulated
from tests.emulator.ptx import Race, execute

WIDTH, ROWS = 150, 8  # numbers of several warps, and rows of a program
MANY = ROWS * (GROUP + 1)  # of more than one group


class Ordered:
    """An executor that runs programs in a given order and counts launches.

    Args:
        order: takes the number of programs and returns their numbers in the order in which they run.
    """

    target = "sm80"

    def __init__(self, order) -> None:
        self.order, self.programs = order, []

    def __call__(self, launch):
        config = launch.configs[0]
        grid = launch.grid(config.constants)
        self.programs.append(grid[0])
        execute(
            launch.kernel,
            grid,
            {**launch.arguments, **config.constants},
            num_warps=config.warps,
            blocks=[(x, y) for y in range((*grid, 1)[1]) for x in self.order(grid[0])],
        )
        return config


def norm_sums(rows, backwards=1):
    """Return the gradients of weight, bias and residual_bias after some backward passes, and what they should be."""
    x, grad = torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(rows))
    weight, bias = torch.linspace(1, 2, WIDTH), torch.zeros(WIDTH)
    total, _, statistics, counters = add_layer_norm_forward(x, x, None, weight, bias, 1e-6, torch.float32)
    for _ in range(backwards):
        grad_x, *sums = add_layer_norm_backward(
            None, grad, total, weight, None, statistics, counters, torch.float32, None
        )
    unit = (2 * x).double()
    unit = torch.nn.functional.layer_norm(unit, (WIDTH,))
    return sums[:3], [(grad * unit).sum(0), grad.double().sum(0), grad_x.double().sum(0)]


def gelu_sums(rows, backwards=1):
    """Return the gradient of hidden_bias after some backward passes, and what it should be."""
    hidden, grad = torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(rows))
    bias = torch.zeros(WIDTH)
    _, counters = gelu_forward(hidden, bias)
    for _ in range(backwards):
        grad_hidden = grad.clone()
        _, grad_bias = gelu_backward(grad_hidden, hidden, bias, counters)
    return [grad_bias], [grad_hidden.double().sum(0)]


SUMS = {"_add_layer_norm_backward": norm_sums, "_gelu_backward": gelu_sums}


def run(kernel, executor, *arguments):
    """Return the sums of a kernel, which have to be right."""
    with emulated(executor):
        sums, expected = SUMS[kernel](*arguments)
    for value, wanted in zip(sums, expected, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-4)
    return sums


@pytest.mark.parametrize("kernel", SUMS)
@pytest.mark.parametrize("programs", [0, 1, GROUP, GROUP + 1])
def test_sums_of_any_number_of_programs_are_right_in_one_launch(kernel, programs):
    executor = Ordered(range)
    run(kernel, executor, max(0, ROWS * programs - 3))
    assert executor.programs[1:] == ([programs] if programs else [])  # the first launch is the forward pass


@pytest.mark.parametrize("kernel", SUMS)
def test_more_rows_do_not_take_more_programs(kernel):
    executor = Ordered(range)
    run(kernel, executor, MOST_PROGRAMS * ROWS + 1)
    assert GROUP < executor.programs[-1] <= MOST_PROGRAMS


@pytest.mark.parametrize("kernel", SUMS)
def test_the_order_in_which_programs_end_does_not_matter(kernel):
    expected = run(kernel, Ordered(range), MANY)
    for order in (lambda count: range(count)[::-1], lambda count: torch.randperm(count).tolist()):
        assert all(map(torch.equal, run(kernel, Ordered(order), MANY), expected))


@pytest.mark.parametrize("kernel", SUMS)
def test_a_second_backward_pass_finds_the_counters_as_the_first_did(kernel):
    expected = run(kernel, Ordered(range), MANY)
    assert all(map(torch.equal, run(kernel, Ordered(range), MANY, 3), expected))


def drop_barrier_before_counting(ptx: str) -> str:
    return re.sub(r"bar\.sync\s+0;((?:(?!bar\.sync)[^{])*?atom\.global)", r"\1", ptx)


def drop_barrier_after_counting(ptx: str) -> str:
    return re.sub(r"(atom\.global(?:(?!bar\.sync).)*?)bar\.sync\s+0;", r"\1", ptx, flags=re.DOTALL)


MUTATIONS = {
    "no barrier before": drop_barrier_before_counting,
    "no barrier after": drop_barrier_after_counting,
    "relaxed": lambda ptx: ptx.replace(".acq_rel.", ".relaxed."),
    "released only": lambda ptx: ptx.replace(".acq_rel.", ".release."),
    "acquired only": lambda ptx: ptx.replace(".acq_rel.", ".acquire."),
}


@pytest.mark.parametrize("kernel", SUMS)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_partial_sums_that_are_not_waited_for_are_found(kernel, mutation):
    with pytest.raises(Race):
        run(kernel, Emulator("sm80", mutated=kernel, mutate=MUTATIONS[mutation]), MANY)


def keep_counters(ptx: str) -> str:
    """Drop the stores to the addresses of atomic operations, which reset the counters."""
    for counter in re.findall(r"atom\.global[^,]*, (\[[^\]]*\])", ptx):
        ptx = re.sub(rf"@%p\d+ st\.global\.b32 {re.escape(counter)}[^;]*;", "", ptx)
    return ptx


@pytest.mark.parametrize("kernel", SUMS)
def test_counters_that_are_not_reset_are_found_in_the_second_backward_pass(kernel):
    emulator = Emulator("sm80", mutated=kernel, mutate=keep_counters)
    run(kernel, emulator, MANY)
    with pytest.raises(AssertionError):
        run(kernel, emulator, MANY, 2)
