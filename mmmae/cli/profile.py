"""`mmmae profile`: the bill of a model."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from ..config import PRESETS, MMMAEConfig
from .options import Commands, config_fields


def add(commands: Commands) -> None:
    """Declare the command."""
    parser = commands.add_parser("profile", help="the bill of a model: parameters, MACs, bytes, launches")
    parser.add_argument("preset", nargs="?", default="base", choices=list(PRESETS), help="default: base")
    parser.add_argument("--batch", type=int, default=1, metavar="B")
    parser.add_argument("--reference", action="store_true", help="bill the plain reference model instead")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a config field")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--html", type=Path, metavar="FILE", help="write a page")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Count, and print or write."""
    from .. import profile
    from ..files import check_can_write, write_atomically
    from ..model import reference

    if options.html is not None:
        if not options.html.parent.is_dir() or options.html.is_dir():
            raise ValueError(f"--html is {options.html}, expected a file in a folder that exists")
        check_can_write(options.html.parent)
    config = MMMAEConfig.preset(options.preset, **config_fields(options.set))
    report = profile(reference.reference_model(config) if options.reference else config, batch=options.batch)
    if importlib.util.find_spec("fvcore") is None:
        print("counted by PyTorch alone; fvcore checks it: pip install 'mmmae[profile]'", file=sys.stderr)
    if options.html is not None:
        write_atomically(options.html, lambda path: path.write_text(report.to_html()))
        print(f"wrote {options.html}")
    elif options.json:
        print(report.to_json())
    elif options.markdown or importlib.util.find_spec("rich") is None:
        print(report.to_markdown())
    else:
        report.print()
