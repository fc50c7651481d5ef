"""The PTX emulator sees every offset of a program that is changed; tests/emulator/test_ptx_errors.py changes three."""

import pytest

from tests.emulator.test_ptx_errors import ACCESSES, CASES, check_changed_offsets


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("access", ACCESSES)
def test_every_offset_that_is_changed_is_seen(name, access):
    check_changed_offsets(name, access, every=True)
