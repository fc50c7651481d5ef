"""Triton's launch path over a stub of the driver, for the targets that the default tests leave out."""

import pytest
import torch

from tests.kernels.test_launch_path import check_launches


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose driver torch has loaded already")
@pytest.mark.parametrize("target", ["sm80", "sm120"])
def test_what_reaches_the_driver_is_what_executors_are_told(target):
    check_launches(target)
