"""`mmmae info`: versions, devices, and what serves each op."""

from __future__ import annotations

import argparse

from .options import Commands


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("info", help="versions, devices, and which implementation serves each op")
    parser.add_argument(
        "--for",
        dest="calls",
        action="append",
        default=[],
        metavar="TARGET:DTYPE[:WIDTH]",
        help="which backend of attention would be chosen elsewhere, as in sm_90:bf16; may be repeated",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print it."""
    from ..info import parse_call, print_info, print_info_for

    calls = [parse_call(text) for text in options.calls]
    if calls:
        print_info_for(calls)
    else:
        print_info()
