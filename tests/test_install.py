"""Installation: both packages whole, the native library only where it can be built, requirements pinned."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mmmae.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"mmmae": ROOT / "mmmae", "mmmae_kernels": ROOT / "kernels" / "mmmae_kernels"}
MESSAGE = "mmmae: installing without the native CPU library"


def run_setup(*arguments: str | Path, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of setup.py, without what the environment says of the native library."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("MMMAE_NATIVE", "CMAKE_ARGS")}
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=root, env=inherited | environment, capture_output=True, text=True, check=False)


def build_without_compiler(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build the native library where no compiler can be found."""
    for tool in ("cmake", "ninja", "nanobind"):
        pytest.importorskip(tool)
    return run_setup("build_ext", "-b", folder / "lib", "-t", folder / "temp", CXX="/nonexistent", **environment)


def test_a_wheel_holds_both_packages_whole_and_no_source_of_the_library(tmp_path):
    done = run_setup("build_py", "--build-lib", tmp_path)
    assert done.returncode == 0, done.stderr
    built = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*") if path.suffix != ".pyc"}
    wanted = {
        Path(package) / path.relative_to(folder)
        for package, folder in PACKAGES.items()
        for ending in ("*.py", "*.pyi", "py.typed")
        for path in folder.rglob(ending)
    }
    assert built == wanted
    assert {Path("mmmae/py.typed"), Path("mmmae_kernels/py.typed"), Path("mmmae_kernels/_native.pyi")} <= built


def test_the_metadata_names_both_packages_and_the_command(tmp_path):
    done = run_setup("egg_info", "--egg-base", tmp_path)
    assert done.returncode == 0, done.stderr
    info = tmp_path / "mmmae.egg-info"
    assert (info / "top_level.txt").read_text().split() == ["mmmae", "mmmae_kernels"]
    assert "mmmae = mmmae.cli:main" in (info / "entry_points.txt").read_text()
    metadata = (info / "PKG-INFO").read_text()
    assert "Requires-Python: >=3.10" in metadata
    assert "License-Expression: Apache-2.0" in metadata


def test_an_editable_install_is_found_beside_a_folder_of_its_name(tmp_path):
    checkout, environment, beside = tmp_path / "checkout", tmp_path / "venv", tmp_path / "beside"
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("mmmae", "kernels"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, checkout)
    done = run_setup("editable_wheel", "--dist-dir", tmp_path, root=checkout, MMMAE_NATIVE="0")
    assert done.returncode == 0, done.stderr
    venv.create(environment)
    (packages,) = environment.glob("lib/*/site-packages")
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    (beside / "mmmae").mkdir(parents=True)
    code = "from importlib.util import find_spec as find; print(find('mmmae').origin, find('mmmae_kernels').origin)"
    python = [environment / "bin" / "python", "-c", code]
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(python, cwd=beside, env=inherited, capture_output=True, text=True, check=True).stdout.split()
    assert found == [str(checkout / "mmmae/__init__.py"), str(checkout / "kernels/mmmae_kernels/__init__.py")]


def test_without_a_compiler_it_builds_without_the_library_and_says_so_once(tmp_path):
    done = build_without_compiler(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(MESSAGE) == 1
    assert "/nonexistent" in done.stderr.split(MESSAGE)[1]
    assert not list((tmp_path / "lib").rglob("_native*"))


def test_switched_off_it_builds_without_the_library_and_says_so_once(tmp_path):
    done = build_without_compiler(tmp_path, MMMAE_NATIVE="0")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(MESSAGE) == 1
    assert "MMMAE_NATIVE=0" in done.stderr
    assert not (tmp_path / "temp" / "native").exists()


def test_asked_for_by_name_a_library_that_does_not_build_is_an_error(tmp_path):
    done = build_without_compiler(tmp_path, MMMAE_NATIVE="1")
    assert done.returncode != 0
    assert "mmmae: the native CPU library could not be built" in done.stderr


def project() -> dict[str, Any]:
    """Return pyproject.toml as a dict."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_extras_named_in_messages_are_those_of_the_package():
    from packaging.requirements import Requirement

    extras = project()["project"]["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        assert {Requirement(text).name for text in extras[extra]} == set(packages), extra
    (everything,) = map(Requirement, extras["all"])
    assert everything.extras == EXTRAS.keys()


def test_the_pins_cover_every_requirement():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    declared = project()
    extras = declared["project"]["optional-dependencies"]
    required = [*declared["project"]["dependencies"], *extras["dev"], *declared["build-system"]["requires"]]
    for text in required:
        requirement = Requirement(text)
        if requirement.name == declared["project"]["name"]:  # other extras, all of which are installed
            required += [each for extra in requirement.extras for each in extras[extra]]
            continue
        versions = [pin for pin in pins if canonicalize_name(pin.name) == canonicalize_name(requirement.name)]
        assert versions, f"{requirement.name} is not pinned"
        for pin in versions:
            (version,) = pin.specifier
            assert version.operator == "=="
            assert version.version in requirement.specifier, f"{pin} does not satisfy {requirement}"
