"""A plugin for pytest that breaks something on purpose, as BROKEN says, before the bench suite runs."""

import importlib
import os

from mmmae.cost import mac_formulas


def op() -> None:
    """The native GELU gives 1 % too much."""
    gelu = importlib.import_module("mmmae_kernels.gelu_linear.cpu")  # the package's name is the function's
    right = gelu.gelu_forward
    gelu.gelu_forward = lambda *args: 1.01 * right(*args)


def formula() -> None:
    """Attention counts twice the multiply-adds that it has."""
    right = mac_formulas.MAC_FORMULAS["mmmae::attention"]
    mac_formulas.MAC_FORMULAS["mmmae::attention"] = lambda *shapes: 2 * right(*shapes)


def nothing() -> None:
    """All is well."""


def pytest_configure(config):
    globals()[os.environ["BROKEN"]]()
