"""Compile a kernel for its arguments to the PTX that Triton's JIT would launch."""

import dataclasses
import hashlib
import inspect
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler.compiler import get_cache_invalidating_env_vars, ir
from triton.runtime.cache import get_cache_key, get_cache_manager
from triton.runtime.jit import JITFunction, create_function_from_signature

from tests.emulator.ptx.errors import TooMuchSharedMemory, UnsupportedKernel

# KiB of shared memory that a block may have, by compute capability: CUDA C++ Programming Guide, compute capabilities.
_SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
_STORED = "emulated.json"

# Triton and LLVM make the same code for these: of the instructions that they use, one of them has only conversions of
# float8, which is no type of ours. Of `_COMPARED` kernels that could be taken from another architecture one is compiled
# all the same, and must be equal.
_ALIKE = (80, 86, 89)
_COMPARED = 8
_PACKED = {"fp16": "<e", "fp32": "<f", "fp64": "<d"}


@dataclass(frozen=True)
class Compiled:
    """A kernel for one target and one set of specialised arguments.

    Args:
        signature: Triton's type of each parameter by its name; constexpr ones are no parameters of the PTX.
        shared_bytes: what a block needs.
        threads: of a block.
    """

    ptx: str
    signature: Mapping[str, str]
    shared_bytes: int
    threads: int


_COMPILED: dict[tuple[Any, ...], Compiled] = {}
_LOWERED: dict[str, tuple[str, dict[str, Any]]] = {}  # PTX and metadata by source and options, of `_ALIKE`


def compile_kernel(
    kernel: Any, arguments: Mapping[str, Any], target: str, options: Mapping[str, Any]
) -> tuple[Compiled, dict[str, Any]]:
    """Specialise and compile as a launch with these arguments would, up to the PTX.

    Args:
        options: `num_warps` and the like. Multiply-adds are fused, as in our launches, whatever Triton's default is.

    Returns:
        What was compiled, the same object for the same specialisation, and all arguments with defaults filled in.

    Raises:
        UnsupportedKernel: `kernel` is interpreted or no kernel, an argument is missing or strange, or the target is.
        TooMuchSharedMemory: the target has less than the kernel needs.
    """
    _check(kernel, arguments)
    capability = _capability(target)
    backend = _backend(capability)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = binder(**arguments)
    debug = bool(kernel.debug) or triton.knobs.runtime.debug
    wanted = {"debug": debug, "instrumentation_mode": "", "enable_fp_fusion": True, **options}
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, wanted, bound, specialization, wanted)
    key = (kernel, kernel.cache_key, str(specialization), capability, str(parsed.__dict__))
    if key not in _COMPILED:
        source = ASTSource(kernel, signature, constexprs, attributes)
        _COMPILED[key] = _from_cache(source, signature, parsed, backend, capability)
    return _COMPILED[key], bound


def parameter_bits(value: Any, triton_type: str) -> int:
    """Return the integer whose low bits a launch would pass for an argument."""
    if triton_type.startswith("*"):
        return int(value.data_ptr())
    if triton_type == "bf16":
        return int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).item()) & 0xFFFF
    if triton_type in _PACKED:
        return int.from_bytes(struct.pack(_PACKED[triton_type], value), "little")
    if triton_type[0] in "iu" and triton_type[1:].isdigit():
        return int(value) & (1 << 64) - 1
    raise UnsupportedKernel(f"an argument of type {triton_type}")


def _check(kernel: Any, arguments: Mapping[str, Any]) -> None:
    if not isinstance(kernel, JITFunction):
        interpreted = type(kernel).__name__ == "InterpretedFunction"
        why = "interpreted: TRITON_INTERPRET was set when it was defined" if interpreted else "no @triton.jit function"
        raise UnsupportedKernel(f"{getattr(kernel, '__name__', kernel)} is {why}")
    names = set(kernel.arg_names)
    needed = {p.name for p in kernel.signature.parameters.values() if p.default is inspect.Parameter.empty}
    if strange := set(arguments) - names:
        raise UnsupportedKernel(f"{kernel.__name__} has no parameter {', '.join(sorted(strange))}")
    if missing := needed - set(arguments):
        raise UnsupportedKernel(f"{kernel.__name__} needs {', '.join(sorted(missing))}")
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            raise UnsupportedKernel(f"{name} is on {value.device}; the kernel runs on the CPU")


def _capability(target: str) -> int:
    digits = target.removeprefix("sm").removeprefix("_")
    if not digits.isdigit() or int(digits) < 80:
        raise UnsupportedKernel(f"target is {target!r}, expected 'sm80' or later")
    return int(digits)


@cache
def _backend(capability: int) -> Any:
    return make_backend(GPUTarget("cuda", capability, 32))


def _from_cache(
    source: ASTSource, signature: Mapping[str, str], options: Any, backend: Any, capability: int
) -> Compiled:
    """Return what `_lower` returns, from the folder and under the key of Triton's own cache where it is there."""
    key = get_cache_key(source, backend, options, env_vars=get_cache_invalidating_env_vars())
    folder = get_cache_manager(hashlib.sha256(f"{key}-{capability}".encode()).hexdigest())
    stored = folder.get_file(_STORED)
    if stored is not None:
        return Compiled(**json.loads(Path(stored).read_text()))
    compiled = _lower(source, signature, options, backend, capability)
    folder.put(json.dumps(dataclasses.asdict(compiled)), _STORED, binary=False)
    return compiled


def _lower(source: ASTSource, signature: Mapping[str, str], options: Any, backend: Any, capability: int) -> Compiled:
    """Compile to PTX, or take that of an architecture with the same code; ptxas has no say in what is executed here."""
    if capability in _ALIKE:
        others = {name: value for name, value in vars(options).items() if name not in ("arch", "supported_fp8_dtypes")}
        key = hashlib.sha256(f"{source.hash()}-{others}".encode()).hexdigest()
        if key not in _LOWERED:
            _LOWERED[key] = _run_stages(source, options, backend, capability)
        ptx, metadata = _LOWERED[key]
        made = metadata["target"].arch
        ptx = re.sub(r"^\.target sm_\d+", f".target sm_{capability}", ptx, flags=re.M)
        compared = capability != made and int(key, 16) % _COMPARED == 0
        if compared and _run_stages(source, options, backend, capability)[0] != ptx:
            raise AssertionError(f"{source.name}: sm_{capability} has other code than sm_{made}")
    else:
        ptx, metadata = _run_stages(source, options, backend, capability)
    if metadata.get("global_scratch_size", 0):
        raise UnsupportedKernel(f"{source.name} needs scratch memory")
    limit = _SHARED_KIB.get(capability, 227) * 1024
    if metadata["shared"] > limit:
        raise TooMuchSharedMemory(f"{source.name}: {metadata['shared']} bytes, sm_{capability} has {limit}")
    return Compiled(ptx, dict(signature), metadata["shared"], metadata["num_warps"] * 32)


def _run_stages(source: ASTSource, options: Any, backend: Any, capability: int) -> tuple[str, dict[str, Any]]:
    """Return PTX and metadata by the compiler's stages up to PTX; ptxas would take most of the time."""
    target = GPUTarget("cuda", capability, 32)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    metadata: dict[str, Any] = {"target": target, **options.__dict__}
    for name, stage in stages.items():
        module = stage(module, metadata)
        if name == "ptx":
            break
    return str(module), metadata
