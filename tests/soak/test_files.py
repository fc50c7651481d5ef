"""Five thousand random files, with other seeds than the default tests', see tests/fuzz/files.py."""

import pytest

from tests.fuzz.files import check_files

BLOCK = 500


@pytest.mark.parametrize("start", range(1000, 6000, BLOCK))
def test_files_are_read_exactly_or_refused(start):
    refused, failures = check_files(range(start, start + BLOCK))
    assert failures == []
    assert refused < BLOCK / 2
