"""`mmmae profile`: the cost report of a model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from ..config import MMMAEConfig, Preset
from .options import Fields, Flag, config_fields
from .output import say

FORM = tyro.conf.create_mutex_group(required=False, title="form of the report")


def run(
    preset: Positional[Preset] = "base",
    *,
    batch: int = 1,
    reference: Flag = False,
    fields: Fields,
    json: Annotated[Flag, FORM] = False,
    markdown: Annotated[Flag, FORM] = False,
    html: Annotated[Path | None, FORM] = None,
) -> None:
    """Count a model's parameters, multiply-adds, bytes and kernel launches.

    Args:
        preset: the model
        batch: samples in a batch
        reference: count the plain reference model instead
        fields: change a config field
        json: print JSON
        markdown: print a Markdown table
        html: write a page into this file
    """
    from .. import profile
    from ..files import check_can_write, write_atomically
    from ..model.reference import reference_model

    if html is not None:
        if not html.parent.is_dir() or html.is_dir():
            raise ValueError(f"--html is {html}, expected a file in a folder that exists")
        check_can_write(html.parent)
    config = MMMAEConfig.preset(preset, **config_fields(fields))
    report = profile(reference_model(config) if reference else config, batch=batch)
    if importlib.util.find_spec("fvcore") is None:
        print("counted by PyTorch alone; fvcore checks it: pip install 'mmmae[profile]'", file=sys.stderr)
    if html is not None:
        write_atomically(html, lambda path: path.write_text(report.to_html(), encoding="utf-8"))
        say(f"wrote {html}")
    elif json:
        print(report.to_json())
    elif markdown:
        print(report.to_markdown())
    else:
        report.print()
