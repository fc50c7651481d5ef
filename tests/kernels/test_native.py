"""The compiled library: how it loads, what is said where it is missing, and whose threads it runs on."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from mmmae_kernels.cpu import library as native


def run_python(code: str) -> list[str]:
    """Run code in a new interpreter and return what it prints."""
    lines = [
        "import os, torch",
        "from mmmae_kernels.cpu import library as native",
        "library = native.module()",
        *code.splitlines(),
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system has no /proc/self/maps")


@needs_proc
@pytest.mark.skipif(
    not list(Path(torch.__file__).parent.glob("lib/libgomp*")), reason="this torch ships no libgomp of its own"
)
def test_only_one_openmp_library_is_in_the_process(library):
    mapped = run_python("library.team_size(2)\nprint(*{m.split()[-1] for m in open('/proc/self/maps') if 'gomp' in m})")
    assert [Path(path).parent for path in mapped] == [Path(torch.__file__).parent / "lib"]


def test_torch_set_num_threads_governs_the_team(library):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert library.team_size(torch.get_num_threads()) == threads
            assert library.team_size(threads + 1) == threads + 1
    finally:
        torch.set_num_threads(before)


@needs_proc
def test_the_library_and_torch_run_on_the_same_threads(library):
    started = run_python(
        """
from mmmae_kernels.patch_embed.cpu import gather_rows

def started():
    return len(os.listdir("/proc/self/task")) - alone

def gather():
    gather_rows(volume, (4, 8, 8), ids, out)
    print(started())

def add():
    large.add_(1)
    print(started())

torch.set_num_threads(1)
volume, ids, out = torch.zeros(1, 4, 4, 64, 64), torch.arange(64)[None], torch.zeros(64, 1024)
large = torch.zeros(1_000_000)
alone = len(os.listdir("/proc/self/task"))
gather()
torch.set_num_threads(4)
gather()
add()
torch.set_num_threads(6)
add()
gather()
"""
    )
    assert started == ["0", "3", "3", "5", "5"]


def load_again(monkeypatch) -> None:
    """Load the library again, as a new process would."""
    module, reason = native._load()
    monkeypatch.setattr(native, "_library", module)
    monkeypatch.setattr(native, "_reason", reason)
    native._warn.cache_clear()


def test_switched_off_it_is_missing_without_a_warning(monkeypatch):
    monkeypatch.setenv("MMMAE_NATIVE", "0")
    load_again(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert native.module() is None
    assert "MMMAE_NATIVE=0" in native.unavailable_reason()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'mmmae_kernels._native'"), "was not built"),
        (ImportError("_native.so: undefined symbol:\n GOMP_parallel"), "undefined symbol: GOMP_parallel"),
    ],
)
def test_missing_it_gives_one_line_of_reason_and_warns_once(monkeypatch, error, reason):
    def fail(name):
        raise error

    monkeypatch.delenv("MMMAE_NATIVE", raising=False)
    monkeypatch.setattr(importlib, "import_module", fail)
    load_again(monkeypatch)
    assert reason in native.unavailable_reason()
    assert "\n" not in native.unavailable_reason()
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        libraries = [native.module(), native.module()]
    assert libraries == [None, None]
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_without_it_a_function_says_why(monkeypatch):
    monkeypatch.setenv("MMMAE_NATIVE", "0")
    load_again(monkeypatch)
    missing = native.function("gelu")
    with pytest.raises(RuntimeError, match=r"the native library can't be used: .*MMMAE_NATIVE=0"):
        missing(0, threads=1)


def test_torch_compile_traces_the_question_whether_it_is_there():
    answer = torch.compile(lambda x: x if native.unavailable_reason() is None else -x, fullgraph=True, backend="eager")
    sign = 1 if native.unavailable_reason() is None else -1
    assert torch.equal(answer(torch.ones(1)), torch.full((1,), sign))
