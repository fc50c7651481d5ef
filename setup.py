"""Builds the native CPU library with CMake; everything else about the package is in pyproject.toml.

MMMAE_NATIVE=0 leaves the library out, MMMAE_NATIVE=1 makes a failed build an error. Otherwise a build that fails, for
want of a compiler say, is reported and the package installs without it. CMAKE_ARGS is passed on to CMake.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WITHOUT = "mmmae: installing without the native CPU library (the PyTorch code does its work, slower)"


class BuildNative(build_ext):
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
        # CMake's cache outlives a change of compiler or of a temporary build environment; nothing of it may then stay.
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
            raise SystemExit(f"mmmae: CMake built no {target}: its name and that of setuptools differ")

    def copy_extensions_to_source(self):
        # After a failed build nothing is copied: what an earlier one left behind must not stay.
        for ext in self.extensions:
            (ROOT / "kernels" / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()


setup(
    ext_modules=[Extension("mmmae_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
