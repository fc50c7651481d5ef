"""Ctrl-C from the first moment of a command on: one line, and the status that shells expect."""

import os
import signal
import subprocess
import sys

import pytest

from mmmae import interrupts
from mmmae.cli import main

# In place of PyTorch, whose import takes seconds. Others than Ctrl-C's KeyboardInterrupt end with the status 9.
TORCH = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:
    os._exit(9)
raise ImportError("not interrupted")
"""
SCRIPT = "import sys\nfrom mmmae.cli import main\nsys.exit(main())\n"  # as pip writes it


def heed_interrupts():
    """Undo what shells do for commands in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted_import(tmp_path, *command):
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "mmmae").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    program = [sys.executable, *(word.replace("{folder}", str(tmp_path)) for word in command)]
    started = {"capture_output": True, "text": True, "env": environment, "preexec_fn": heed_interrupts}
    return subprocess.run(program, check=False, **started)


@pytest.mark.parametrize("program", [["{folder}/mmmae"], ["-m", "mmmae"]], ids=["script", "module"])
@pytest.mark.parametrize("arguments", [["data", "check", "x"], []], ids=["command", "none"])
def test_ctrl_c_while_pytorch_is_loaded_is_one_line(tmp_path, program, arguments):
    run = interrupted_import(tmp_path, *program, *arguments)
    assert run.stderr == f"{' '.join(['mmmae', *arguments[:2]])}: interrupted\n"
    assert run.returncode == 130


@pytest.mark.parametrize(
    "code",
    ["import sys, mmmae", "import sys; sys.argv[0] = '/bin/mmmae'; import mmmae"],
    ids=["a program of its own", "a worker of the command line"],
)
def test_other_programs_get_a_keyboard_interrupt(tmp_path, code):
    assert interrupted_import(tmp_path, "-c", code).returncode == 9


def test_a_command_that_runs_is_interrupted_by_an_exception(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)

    def run(*arguments, **options):
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("mmmae.cli._parse", lambda *options: run)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupts.end_at_interrupts()
        assert main(["predict"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "mmmae predict: interrupted\n"
