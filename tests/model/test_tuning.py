"""What `tune_cpu` changes, in processes of their own: its settings can't be taken back."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

import mmmae
from mmmae import tuning

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

# A page is 4 KiB or more: touching all of 40 MB anew takes up to 9766 faults a round. Less than 32 MB glibc may keep by
# itself. The module is loaded from its file, which spares the import of torch.
COUNT_FAULTS = """
import ctypes, resource, runpy
tune_cpu = runpy.run_path({path!r})["tune_cpu"]
tuned = tune_cpu() if {tune} else False
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 40 * 10**6
for number in range(8):
    if number == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = libc.malloc(size)
    ctypes.memset(memory, 1, size)
    libc.free(memory)
print(tuned, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_faults(*, tune: bool, variable: str | None = None) -> tuple[bool, int]:
    """Return what `tune_cpu` returns, and the page faults of six rounds of allocating, touching and freeing memory."""
    environment = {name: value for name, value in os.environ.items() if name != "MMMAE_TUNE_CPU"}
    if variable is not None:
        environment["MMMAE_TUNE_CPU"] = variable
    code = COUNT_FAULTS.format(path=tuning.__file__, tune=tune)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    tuned, faults = done.stdout.split()
    return tuned == "True", int(faults)


@needs_glibc
def test_tuned_the_process_takes_the_memory_that_it_freed():
    _, plain = count_faults(tune=False)
    tuned, few = count_faults(tune=True)
    assert tuned
    assert few < plain / 20


@needs_glibc
def test_a_variable_switches_it_off():
    assert count_faults(tune=True, variable="0")[0] is False
    assert count_faults(tune=True, variable="1")[0] is True


def test_elsewhere_it_does_nothing(monkeypatch):
    def unreachable(name):
        raise AssertionError("no C library may be called")

    monkeypatch.delenv("MMMAE_TUNE_CPU", raising=False)
    monkeypatch.setattr(tuning.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(tuning.ctypes, "CDLL", unreachable)
    assert mmmae.tune_cpu() is False


def test_the_command_line_and_the_recipe_tune(monkeypatch):
    from mmmae import cli
    from mmmae.training import pretrain

    calls = []
    monkeypatch.setattr(cli, "tune_cpu", lambda: calls.append("command line"))
    assert cli.main(["info"]) == 0

    def stop():
        raise InterruptedError("tuned")

    monkeypatch.setattr(pretrain, "tune_cpu", stop)
    with pytest.raises(InterruptedError, match="tuned"):
        pretrain.pretrain(None, None, None)
    assert calls == ["command line"]
