"""Options of the tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-targets", action="store_true", help="execute compiled kernels for every architecture and in every type"
    )
