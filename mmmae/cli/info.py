"""`mmmae info`: versions, devices, and the implementation that serves each op."""

from __future__ import annotations

from typing import Annotated

import tyro
from tyro.conf import UseAppendAction


def run(
    *, calls: Annotated[UseAppendAction[list[str]], tyro.conf.arg(name="for", metavar="TARGET:DTYPE[:WIDTH]")]
) -> None:
    """Print versions, devices, and which implementation serves each op.

    Args:
        calls: print instead which attention backend would be chosen on another machine, as in sm_90:bf16
    """
    from ..info import parse_call, print_info, print_info_for

    parsed = [parse_call(text) for text in calls]
    if parsed:
        print_info_for(parsed)
    else:
        print_info()
