"""The fast model against the reference at the size of `base`, in every case in which a small model is compared."""

import pytest

import mmmae
from tests.model.test_equality import CASES, PRESENCE, assert_equal_models


@pytest.mark.parametrize(("presence", "invalid", "fields"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_fast_base_equals_reference(presence, invalid, fields):
    assert_equal_models(mmmae.MMMAEConfig.preset("base", **fields), PRESENCE[presence], invalid)
