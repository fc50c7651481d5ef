"""A stand-in for `huggingface_hub` where it is not installed: a model is measured without being shared."""

from __future__ import annotations

import contextlib
import importlib
import sys
from types import ModuleType
from typing import Any


class Mixin:
    """Stands for `PyTorchModelHubMixin`, which takes keywords with a class."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__()


def stand_in() -> bool:
    """Provide what `mmmae` imports of the package where it can't be imported; return whether that was so."""
    with contextlib.suppress(ImportError):  # of the package, or of one that it needs
        importlib.import_module("huggingface_hub.hub_mixin")
        return False
    for name in [name for name in sys.modules if name.split(".")[0] == "huggingface_hub"]:
        del sys.modules[name]
    package, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    vars(package).update(PyTorchModelHubMixin=Mixin, snapshot_download=None, errors=errors)
    vars(errors).update(HfHubHTTPError=OSError)
    sys.modules |= {"huggingface_hub": package, "huggingface_hub.errors": errors}
    return True
