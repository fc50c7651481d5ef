"""The default losses of small models under torch.compile; tests/model/test_compile.py compiles all switches."""

import pytest

from tests.model.test_compile import check_compiled

THREE = {"ir": 1, "af": 1, "thickness": 1}


@pytest.mark.parametrize("fields", [{}, {"depth": 2, "aux": THREE, "symmetric": True}], ids=str)
def test_a_model_compiles_in_one_graph_for_any_size(fields):
    check_compiled(**fields)
