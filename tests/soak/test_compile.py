"""Small models and ops under torch.compile in one graph for any size of all tensors, not of the batch alone."""

import pytest

from tests.kernels.test_torch_library import check_compiled as check_op
from tests.kernels.test_torch_library import each_op
from tests.model.test_compile import SWITCHES, check_compiled

THREE = {"ir": 1, "af": 1, "thickness": 1}


@pytest.mark.parametrize("fields", [{}, {"depth": 2, "aux": THREE, "symmetric": True}, SWITCHES], ids=str)
def test_a_model_compiles_in_one_graph_for_any_size(fields):
    check_compiled(dynamic=True, **fields)


@each_op
def test_an_op_compiles_in_one_graph_for_any_size(op):
    check_op(op, dynamic=True)
