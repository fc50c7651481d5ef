"""Build the native CPU library with CMake, and install in editable mode by a path file; the rest is in pyproject.toml.

MMMAE_NATIVE=0 leaves the library out, MMMAE_NATIVE=1 makes a failed build an error. By default a build that fails, for
example because there is no compiler, is reported and the package installs without it. CMAKE_ARGS is passed to CMake.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
WITHOUT = "mmmae: installing without the native CPU library (PyTorch code does its work, slower)"


class BuildNative(build_ext):
    """Build the native library, or say once why the package installs without it."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)
        if os.environ.get("MMMAE_NATIVE") == "0":
            print(f"{WITHOUT}: MMMAE_NATIVE=0", file=sys.stderr)
            return
        try:
            self.run_cmake(target, Path(self.build_temp).resolve() / "native")
        except subprocess.CalledProcessError as error:
            reason = "\n    ".join(["the build said", *error.output.strip().splitlines()[-40:]])
            if os.environ.get("MMMAE_NATIVE") == "1":
                raise SystemExit(f"mmmae: the native CPU library could not be built: {reason}") from None
            print(f"{WITHOUT}: {reason}", file=sys.stderr)

    def run_cmake(self, target, build):
        import ninja

        cmake = [sys.executable, "-m", "cmake"]
        nanobind = [sys.executable, "-m", "nanobind", "--cmake_dir"]
        configure = [
            *[*cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build)],
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja', path=ninja.BIN_DIR or None)}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dnanobind_DIR={subprocess.check_output(nanobind, text=True).strip()}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        # CMake's cache survives a change of compiler or of a temporary build environment, and must then be discarded.
        settings = build / "settings.txt"
        wanted = repr((configure, [os.environ.get(name) for name in ("CXX", "CXXFLAGS", "LDFLAGS")]))
        if not settings.exists() or settings.read_text() != wanted:
            shutil.rmtree(build, ignore_errors=True)
        for command in (configure, [*cmake, "--build", str(build), "--", "--quiet"]):
            output = subprocess.check_output(command, text=True, stderr=subprocess.STDOUT)
            if "warning:" in output:
                print(output, file=sys.stderr)
            settings.write_text(wanted)
        if not target.exists():
            raise SystemExit(f"mmmae: CMake did not build {target}, the file name that setuptools expects")

    def copy_extensions_to_source(self):
        # After a failed build nothing is copied, and the library of an earlier build must not stay.
        for ext in self.extensions:
            (ROOT / "kernels" / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


class EditableByPath(editable_wheel):
    """Put the folders of both packages on the path of an editable install.

    The import hook that setuptools would install is asked after the path, so that a folder named `mmmae` in the current
    directory, such as a clone of this repository, would be imported as an empty namespace package.
    """

    def _select_strategy(self, name, tag, build_lib):
        return PathFile()


class PathFile(contextlib.nullcontext):
    """Write the path file into the wheel of an editable install."""

    def __call__(self, wheel, files, mapping):
        wheel.writestr("__editable__.mmmae.pth", f"{ROOT}\n{ROOT / 'kernels'}\n")


setup(
    ext_modules=[Extension("mmmae_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "editable_wheel": EditableByPath},
)
