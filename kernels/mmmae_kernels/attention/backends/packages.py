"""Optional packages with attention kernels, which are found without an import and imported silently on first use."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import warnings
from types import ModuleType

import torch

from ...dispatch import Reason, constant_when_compiled


@constant_when_compiled
def refuses(distribution: str, module: str) -> Reason:
    """Return None if `module` of a package can be used on this machine, else the reason in one line.

    Args:
        distribution: name of the package for installers.
        module: module to import; nothing is imported on a machine without a GPU.
    """
    if not is_installed(distribution, module):
        return f"{distribution} is not installed"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return _import(module)[1]


def is_installed(distribution: str, module: str) -> bool:
    """Return whether a package is installed, by its metadata or, without metadata, by a top-level module."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        # find_spec of a submodule would import its parents.
        return "." not in module and importlib.util.find_spec(module) is not None
    return True


def load(module: str) -> ModuleType:
    """Import and return a module.

    Raises:
        RuntimeError: the module can't be imported.
    """
    loaded, reason = _import(module)
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


@functools.cache
def _import(module: str) -> tuple[ModuleType | None, Reason]:
    """Import a module, discarding its output, logs and warnings; return it, or None and the reason."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            return importlib.import_module(module), None
    except Exception as error:  # an extension built for another torch, CUDA or Python may raise anything
        return None, f"{module} can't be imported: {type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        logging.disable(disabled)
