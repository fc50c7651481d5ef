"""Triton's own launch path without a GPU: binder, specialisation and C launcher over a driver that launches nothing.

`install("sm90")` builds the driver with the C compiler that Triton needs anyway, and makes it Triton's active one. It
is the process's: a program installs it once, before it launches anything. Tensors lie on the CPU, and
`execute_by(StandInGpu("sm90"))` sends their launches there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("stub.c")
FOLDER = Path(__file__).parents[3] / "build" / "stub_driver"


class Started(NamedTuple):
    """The arguments of a launch, as the driver gets them."""

    function: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    parameters: list[bytes]


class StubDriver:
    """The driver's library and the parameter sizes of its kernels.

    Attributes:
        sizes: kernel handle -> size in bytes of each parameter, read from the kernel's machine code.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library, self.sizes = library, dict[int, list[int]]()
        library.stub_launches.restype = ctypes.c_longlong

    @property
    def launches(self) -> int:
        """Number of launches so far."""
        return int(self._library.stub_launches())

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Started]]:
        """Yield a list to which the launches of the block are appended."""
        started: list[Started] = []

        def hear(function: int, config: Any, addresses: Any) -> None:
            made, sizes = config.contents, self.sizes[function]
            parameters = [ctypes.string_at(addresses[place], size) for place, size in enumerate(sizes)]
            grid, block = tuple(made.grid), tuple(made.block)
            started.append(Started(function, grid, block, made.shared, made.stream or 0, parameters))

        kept = _Listener(hear)
        self._library.stub_listen(kept)
        try:
            yield started
        finally:
            self._library.stub_listen(_Listener())


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
    )


_Listener = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(_Config), ctypes.POINTER(ctypes.c_void_p))


def lacking() -> str | None:
    """Return what the stub needs and this machine lacks, or None."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set: Triton starts nothing"
    if shutil.which("gcc") is None:
        return "needs gcc"
    return None


def install(target: str) -> StubDriver:
    """Make the stub Triton's active driver, for a target such as "sm80"."""
    library = ctypes.CDLL(str(_built()), mode=ctypes.RTLD_GLOBAL)  # whoever loads libcuda.so.1 from here on has this
    os.environ["TRITON_LIBCUDA_PATH"] = str(FOLDER)
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    from mmmae_kernels.gpu.config import SHARED_MEMORY

    capability = divmod(int(target.removeprefix("sm")), 10)
    library.stub_choose(*capability, SHARED_MEMORY[target])
    active = CudaDriver()
    active.get_device_capability = lambda device=0: capability
    active.get_current_device = lambda: 0
    active.set_current_device = lambda device: None
    active.get_current_stream = lambda device: 0
    stub, load = StubDriver(library), active.utils.load_binary

    def load_binary(name: str, cubin: bytes, *arguments: int) -> Any:
        module, function, *facts = load(name, cubin, *arguments)
        stub.sizes[function] = parameter_sizes(cubin, name)
        return module, function, *facts

    active.utils.load_binary = load_binary
    driver.set_active(active)
    return stub


def parameter_sizes(cubin: bytes, name: str) -> list[int]:
    """Read the size in bytes of each parameter of a kernel from the section `.nv.info.NAME` of an ELF file.

    The section is a sequence of attributes: one byte for the format, one for the kind, and, where the format is 4, two
    for the length of the data that follow. Kind 0x17 describes a parameter: its number is at byte 4, its size in bits
    18 to 31 of the last word.
    """
    info, place, sizes = _section(cubin, f".nv.info.{name}"), 0, {}
    while place < len(info):
        form, kind, length = struct.unpack_from("<BBH", info, place)
        place += 4
        if form == 4:
            if kind == 0x17:
                number, packed = struct.unpack_from("<4xH2xI", info, place)
                sizes[number] = packed >> 18
            place += length
    return [sizes[number] for number in range(len(sizes))]


def _section(elf: bytes, name: str) -> bytes:
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    sections = [struct.unpack_from("<I20xQQ", elf, table + size * number) for number in range(count)]
    for name_at, start, length in sections:
        if elf[sections[names][1] + name_at :].startswith(name.encode() + b"\0"):
            return elf[start : start + length]
    raise ValueError(f"the kernel's machine code has no section {name}")


def _built() -> Path:
    """Return the path of the library, after building it where the source is newer."""
    library = FOLDER / "libcuda.so.1"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        FOLDER.mkdir(parents=True, exist_ok=True)
        new = library.with_suffix(f".{os.getpid()}")
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", "-o", new, SOURCE], check=True)
        os.replace(new, library)  # two processes may build at once
    return library
