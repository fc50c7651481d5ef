"""Compiles Triton kernels for a GPU that need not be here, specialised as a launch there would be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from triton import compile as compile_source
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from .config import Config


def compile_kernel(kernel: Any, arguments: Mapping[str, Any], config: Config, target: str) -> Any:
    """The compiled kernel that a launch with these arguments would start on `target`.

    Args:
        kernel: a `triton.jit` function.
        arguments: tensors (on any device that has addresses) and numbers by name, as `launch` takes them.
        config: block sizes, warps and stages.
        target: `sm80` or `gfx942` for instance.

    Raises:
        ValueError: the kernel is one of Triton's interpreter, which compiles nothing.
    """
    source, options = kernel_source(kernel, arguments, config, target)
    return compile_source(source, target=gpu_target(target), options=options)


def kernel_source(
    kernel: Any, arguments: Mapping[str, Any], config: Config, target: str
) -> tuple[ASTSource, dict[str, Any]]:
    """What is compiled, specialised to the arguments, and the compiler's options; see `compile_kernel`."""
    if not isinstance(kernel, JITFunction):
        raise ValueError("the kernel was made for Triton's interpreter: unset TRITON_INTERPRET to compile it")
    backend = make_backend(gpu_target(target))
    given = config.options(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given = bind(**arguments, **config.constants, **given)
    options, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialization, given)
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def gpu_target(name: str) -> GPUTarget:
    """Triton's name of an architecture; ValueError if it is no `sm..` and no `gfx..`."""
    if name.startswith("sm") and name[2:].isdigit():
        return GPUTarget("cuda", int(name[2:]), 32)
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    raise ValueError(f"target is {name!r}, expected an architecture such as sm90 or gfx942")
