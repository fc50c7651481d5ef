"""Fixtures of the kernel tests."""

import pytest

from mmmae_kernels import native


@pytest.fixture
def library():
    if native.unavailable_reason() is not None:
        pytest.skip(native.unavailable_reason())
    return native.library()
