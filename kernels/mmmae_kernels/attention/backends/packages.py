"""Optional packages with attention kernels: found without importing them, imported without a word when first needed."""

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
    """None if `module` of a package can be used on this machine, else one line that says why not.

    Args:
        distribution: the package's name to an installer.
        module: what is imported of it; where there is no GPU nothing is.
    """
    if not is_installed(distribution, module):
        return f"{distribution} is not installed"
    if not torch.cuda.is_available():
        return "there is no GPU that torch can use"
    return _import(module)[1]


def is_installed(distribution: str, module: str) -> bool:
    """Whether a package is there, by its metadata or, if it was put on the path without, by a module at top level."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        # To look for a submodule would import its parents.
        return "." not in module and importlib.util.find_spec(module) is not None
    return True


def load(module: str) -> ModuleType:
    """The module.

    Raises:
        RuntimeError: it can't be imported.
    """
    loaded, reason = _import(module)
    if loaded is None:
        raise RuntimeError(reason)
    return loaded


@functools.cache
def _import(module: str) -> tuple[ModuleType | None, Reason]:
    """The module, or why there is none. What a package prints, logs or warns of while it is imported is dropped."""
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
    except Exception as error:  # whatever an extension built for another torch, CUDA or Python comes up with
        return None, f"{module} can't be imported: {type(error).__name__}: {' '.join(str(error).split())}"
    finally:
        logging.disable(disabled)
