"""The speed of matrix products, on a clock that only products advance."""

from types import SimpleNamespace

import pytest
import torch

from mmmae.training import reports

PRODUCT_SPEED = reports.product_speed  # before a fixture replaces it


@pytest.mark.parametrize(
    ("speed", "sizes"),
    [(1e9, {256}), (5e10, {256, 1024}), (1e14, {256, 1024, 4096})],
    ids=["one slow thread", "one thread", "GPU"],
)
def test_the_speed_of_products_is_measured_in_a_quarter_of_a_second(monkeypatch, speed, sizes):
    seconds, seen = [0.0], set()

    def product(left, right):
        seconds.append(seconds[-1] + len(left) ** 3 / speed)
        seen.add(len(left))
        return left

    monkeypatch.setattr(reports, "time", SimpleNamespace(perf_counter=lambda: seconds[-1]))
    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    assert PRODUCT_SPEED(torch.device("cpu"), torch.bfloat16) == pytest.approx(speed, rel=1e-3)
    assert seconds[-1] - seconds[1] <= 0.25
    assert seen == sizes
