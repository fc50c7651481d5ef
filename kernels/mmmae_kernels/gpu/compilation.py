"""Compilation of Triton kernels for an architecture, whether or not the machine has such a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from triton import compile as compile_source
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from .config import Config


def compile_kernel(kernel: Any, arguments: Mapping[str, Any], config: Config, target: str) -> Any:
    """Return the compiled kernel that a launch with these arguments would start on `target`.

    Args:
        kernel: a `triton.jit` function.
        arguments: the kernel's arguments by name; tensors may be on any device with addresses.
        config: block sizes, warps and stages.
        target: architecture, for example `sm80` or `gfx942`.

    Raises:
        ValueError: the kernel was created under TRITON_INTERPRET=1 and can't be compiled.
    """
    source, options = kernel_source(kernel, arguments, config, target)
    return compile_source(source, target=gpu_target(target), options=options)


def kernel_source(
    kernel: Any, arguments: Mapping[str, Any], config: Config, target: str
) -> tuple[ASTSource, dict[str, Any]]:
    """Return the source specialised to the arguments, and the compiler's options; see `compile_kernel`."""
    if not isinstance(kernel, JITFunction):
        raise ValueError("the kernel was made for Triton's interpreter; unset TRITON_INTERPRET to compile it")
    backend = make_backend(gpu_target(target))
    given = config.options(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given = bind(**arguments, **config.constants, **given)
    options, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialization, given)
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def gpu_target(name: str) -> GPUTarget:
    """Return Triton's description of an architecture, or raise ValueError unless it is `sm..` or `gfx..`."""
    if name.startswith("sm") and name[2:].isdigit():
        return GPUTarget("cuda", int(name[2:]), 32)
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"target is {name!r}, expected an architecture such as sm90 or gfx942")
