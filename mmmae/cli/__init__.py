"""The command line: one function per command, whose parameters and docstring are the options and their help.

tyro makes the parser from them; a command imports what it needs when it runs, so that `mmmae --help` answers at once.
"""

import contextlib
import dataclasses
import functools
import inspect
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, TypeAlias

import tyro

from ..extras import explain_missing
from ..interrupts import INTERRUPTED, command_name, interrupted, raise_interrupts
from ..text import printable
from ..tuning import tune_cpu
from . import data, encode, export, finetune, import_encoder, info, predict, pretrain, profile, reconstruct
from .options import Flag
from .output import UnreadOutput, one_line
from .rules import registry
from .stored import Stored, read_stored

RUNS = ("pretrain", "finetune", "predict", "encode", "reconstruct")  # go on when nobody reads what they print

Call: TypeAlias = Callable[[], "int | None"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; for bad input, after one line on standard error, 2; for a lost worker process and where memory is short 1;
        and after Ctrl-C 130. `data check` returns 1 where there is damage.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        from .. import __version__

        print(f"mmmae {__version__}")
        return 0
    traceback = "--traceback" in arguments
    with _warnings_of_one_line():
        return _call(command_name(arguments), arguments, traceback=traceback)


def _call(command: str, arguments: list[str], *, traceback: bool) -> int:
    try:
        raise_interrupts()
        tune_cpu()
        stored = read_stored(command, arguments)
        call = _parse(command, arguments, stored)
        with contextlib.redirect_stdout(UnreadOutput(sys.stdout)) if command in RUNS else contextlib.nullcontext():
            return call() or 0
    except (ValueError, OSError) as error:
        if traceback:
            raise
        _complain(command, str(error))
        return 1 if isinstance(error, ChildProcessError) else 2
    except (MemoryError, RuntimeError) as error:
        if traceback or not _memory_is_short(error):
            raise
        hint = f"a smaller batch, tile or model needs less (mmmae --traceback {command}: where)"
        _complain(command, f"out of memory; {hint}")
        return 1
    except ModuleNotFoundError as error:
        reason = explain_missing(error)
        if reason is None or traceback:
            raise
        print(f"mmmae {command}: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(interrupted(arguments, *map(str, error.args)), file=sys.stderr)
        return INTERRUPTED


def _complain(command: str, reason: str) -> None:
    rank = f"process {os.environ['RANK']}: " if "RANK" in os.environ else ""
    print(f"mmmae {command}: {rank}{printable(' '.join(reason.split()))}", file=sys.stderr)


def _memory_is_short(error: MemoryError | RuntimeError) -> bool:
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def _warnings_of_one_line() -> Iterator[None]:
    before, warnings.formatwarning = warnings.formatwarning, one_line
    try:
        yield
    finally:
        warnings.formatwarning = before


def _parse(command: str, arguments: Sequence[str], stored: Stored) -> Call:
    """Return the call that the arguments ask for; tyro exits with 2 where they are wrong."""
    commands = {
        "info": _later(info.run),
        "profile": _later(profile.run),
        "data": Data,
        "pretrain": _later(pretrain.run, stored=stored),
        "finetune": _later(finetune.run, stored=stored),
        "predict": _later(predict.run),
        "encode": _later(encode.run),
        "reconstruct": _later(reconstruct.run),
        "export": _later(export.run),
        "import": _later(import_encoder.run),
        "import-spectralgpt": _later(import_encoder.run_spectralgpt),
    }

    @dataclasses.dataclass(frozen=True)
    class CommandLine:
        """Multi-modal guided masked autoencoders for hyperspectral images, made fast.

        Args:
            traceback: show where an error comes from
            version: print the version
        """

        command: Annotated[Call, tyro.conf.arg(constructor=_choice(commands))]
        traceback: Flag = False
        version: Flag = False

    at = arguments.index(command) + 1 if command in arguments else 0
    return tyro.cli(
        CommandLine,
        prog="mmmae",
        args=[*arguments[:at], *stored.options, *arguments[at:]],
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.DisallowNone),
        registry=registry,
    ).command


def _later(function: Callable[..., int | None], **bound: Any) -> Callable[..., Call]:
    """Return a function of the same options, but for `bound`, that returns the call instead of making it.

    Errors of a command are then raised outside the parser, which would print them as errors of the options.
    """

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Call:
        return functools.partial(function, *arguments, **options, **bound)

    signature = inspect.signature(function)
    parameters = [parameter for name, parameter in signature.parameters.items() if name not in bound]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


def _choice(commands: dict[str, Any]) -> Any:
    """Return the type from which tyro makes a choice of commands."""
    choices = (Annotated[Any, tyro.conf.subcommand(name, constructor=command)] for name, command in commands.items())
    return functools.reduce(operator.or_, choices)


@dataclasses.dataclass(frozen=True)
class Data:
    """Generate, check, cache and pack files of subjects."""

    part: Annotated[
        Call,
        tyro.conf.arg(
            constructor=_choice(
                {
                    "check": _later(data.check),
                    "cache": _later(data.cache),
                    "shard": _later(data.shard),
                    "phantom": _later(data.phantom),
                }
            )
        ),
    ]

    def __call__(self) -> int | None:
        """Run the part that was chosen."""
        return self.part()
