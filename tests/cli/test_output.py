"""Runs go on when nobody reads what they print, and warnings keep to their line."""

import os
import subprocess
import sys
import warnings

import mmmae
from mmmae import cli
from mmmae.cli import main
from mmmae.cli.output import UnreadOutput

PATHS = {package.__name__: list(package.__path__) for package in (mmmae, cli)}
# Empty packages stand for both, which spares the import of torch.
PRINTS = f"""
import sys, types
for name, paths in {PATHS}.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = paths
from mmmae.cli.output import UnreadOutput
sys.stdout = UnreadOutput(sys.stdout)
print("first", flush=True)
sys.stdin.readline()  # until the reader has left
for _ in range(3):
    print("x" * 100_000, flush=True)
print("goes on", file=sys.stderr)
"""


def test_output_without_a_reader_is_dropped_and_the_status_is_zero():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PRINTS], text=True, **pipes) as process:
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        _, errors = process.communicate("left\n")
    assert errors == "goes on\n"
    assert process.returncode == 0


def test_output_with_a_reader_is_the_stream(tmp_path):
    with (tmp_path / "out").open("w") as stream:
        output = UnreadOutput(stream)
        print("text", file=output, flush=True)
        assert os.fstat(output.fileno()).st_size == 5


def test_a_warning_of_a_command_is_one_line(monkeypatch):
    shown = []

    def warn():
        shown.append(warnings.formatwarning("scene\nread 9: no damage \x1b[31m", UserWarning, "a.py", 7))
        shown.append(warnings.formatwarning("use another", DeprecationWarning, "a.py", 7))

    monkeypatch.setattr("mmmae.cli._parse", lambda *options: warn)
    before = warnings.formatwarning
    assert main(["info"]) == 0
    assert shown == ["warning: scene read 9: no damage \\x1b[31m\n", "a.py:7: DeprecationWarning: use another\n"]
    assert warnings.formatwarning is before
