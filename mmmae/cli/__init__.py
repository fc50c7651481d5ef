"""The command line: one module a command, each with `add`, which declares it, and `run`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ..extras import explain_missing
from ..tuning import tune_cpu
from . import data, encode, export, finetune, import_spectralgpt, info, pretrain, profile, reconstruct

COMMANDS = (info, profile, data, pretrain, finetune, encode, reconstruct, export, import_spectralgpt)

# A command imports what it needs when it runs: `mmmae --help` answers at once.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; bad input gets one line on standard error and status 2."""
    parser = _parser()
    options = parser.parse_args(arguments)
    command = f"{options.command} {options.part}" if "part" in options else options.command
    tune_cpu()
    try:
        status = options.run(options)
    except (ValueError, OSError) as error:
        if options.traceback:
            raise
        rank = f"process {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(f"mmmae {command}: {rank}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        reason = explain_missing(error)
        if reason is None or options.traceback:
            raise
        print(f"mmmae {command}: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "; the run goes on with --resume auto" if options.command == "pretrain" else ""
        print(f"mmmae {command}: interrupted{again}", file=sys.stderr)
        return 130
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmmae", description="Multi-modal guided masked autoencoders for hyperspectral images, made fast."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.add(commands)
    return parser
