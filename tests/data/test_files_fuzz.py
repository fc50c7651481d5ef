"""Random files of every format are read exactly or refused; more of them in tests/soak."""

from tests.fuzz.files import check_files


def test_files_are_read_exactly_or_refused():
    refused, failures = check_files(range(60))
    assert failures == []
    assert refused < 30
