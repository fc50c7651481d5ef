"""Random masking of tokens: which of each sample's tokens are visible, which masked, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import LARGEST, check_whole, described
from ..dispatch import Arguments, Reason, declare, triton_refuses
from ..operators import declare_operator, kernels_for
from .reference import random_masking_reference

LARGEST_TABLE = 2**60  # numbers, whose bytes are counted in 64 bits


class TokenMask(NamedTuple):
    """Token numbers of a batch, int64. K visible and M masked tokens make N."""

    ids_keep: Tensor  # [B, K] visible tokens, in random order
    ids_masked: Tensor  # [B, M] masked tokens, in random order
    ids_restore: Tensor  # [B, N] place of each token in the two above put together


def random_masking(
    batch: int,
    tokens: int,
    keep: int,
    seed: int | Tensor,
    *,
    device: torch.device | str | None = None,
    first_sample: int = 0,
) -> TokenMask:
    """Draw which tokens of each sample stay visible, as a function of (seed, sample number, token) alone.

    Args:
        batch: samples B, a whole number as all counts are, of Python or NumPy.
        tokens: tokens N of a sample, below 2^32.
        keep: visible tokens K, 0..N.
        seed: a 64-bit integer, or a scalar tensor of integers, the key of Philox 4x32-10.
        device: where the mask is wanted; None is the seed's device, or the CPU.
        first_sample: number of the batch's first sample, so that ranks draw what one process would.

    Raises:
        ValueError: a count is no whole number, or negative, or too large, `keep` is over `tokens`, the seed is no
            64-bit integer, or there is no such device.
    """
    tokens = check_whole("tokens", tokens, 0, 2**32 - 1)
    batch = check_whole("batch", batch)
    if not torch.compiler.is_compiling() and batch * tokens >= LARGEST_TABLE:
        raise ValueError(f"batch is {batch}, expected less than 2^60 tokens in all, of {tokens} a sample")
    keep = check_whole("keep", keep, 0, tokens)
    first_sample = check_whole("first_sample", first_sample, 0, LARGEST - batch)
    seed = seed_tensor(seed)
    device = seed.device if device is None else _check_device(device)
    arguments = (batch, tokens, keep, seed, device, first_sample)
    return TokenMask(*RANDOM_MASKING.select(device, *arguments)(*arguments))


def _forward_fake(batch: int, tokens: int, keep: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, device, _ = rest
    ids_keep, ids_masked, ids_restore = (
        torch.empty(batch, count, dtype=torch.int64, device=device) for count in (keep, tokens - keep, tokens)
    )
    return ids_keep, ids_masked, ids_restore


declare_operator(
    "random_masking",
    "random_masking_forward(SymInt batch, SymInt tokens, SymInt keep, Tensor seed, Device device, SymInt first_sample) "
    "-> (Tensor, Tensor, Tensor)",
    _forward_fake,
    name="random_masking",
)


def _by_kernels(backend: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        tables: tuple[Tensor, Tensor, Tensor] = kernels_for(arguments[3], backend).random_masking_forward(*arguments)
        return tables

    return run


def _native_refuses(arguments: Arguments) -> Reason:
    if arguments["device"].type != "cpu":
        return f"the mask is wanted on {arguments['device']}, native kernels run on the CPU"
    return None


def _triton_refuses(arguments: Arguments) -> Reason:
    return triton_refuses([("the mask", torch.empty(0, device=arguments["device"]))])


def seed_tensor(seed: int | Tensor) -> Tensor:
    """Return the seed as an int64 scalar, after checking that it is a 64-bit integer."""
    seed = check_seed(seed)
    if isinstance(seed, Tensor):
        return seed if seed.dtype == torch.int64 else seed.to(torch.int64)
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64)


def check_seed(seed: int | Tensor) -> int | Tensor:
    """Return the seed, a number of NumPy as an int, after checking that it is a 64-bit integer."""
    if not isinstance(seed, Tensor):
        return check_whole("seed", seed, -(2**63), 2**64 - 1)
    is_integer = not (seed.is_floating_point() or seed.is_complex() or seed.dtype == torch.bool)
    if seed.dim() != 0 or not is_integer or seed.layout is not torch.strided:
        raise ValueError(f"seed is {described(seed)}, expected a scalar of torch.int64")
    return seed


def _check_device(device: torch.device | str) -> torch.device:
    """Return the device, after checking that there is one of that name that torch can use."""
    if not isinstance(device, (str, torch.device)):
        raise ValueError(f"device is {described(device)}, expected a torch.device or the name of one, such as 'cpu'")
    if torch.compiler.is_compiling() or device in _usable:
        return torch.device(device)
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # the first where torch is built without such devices
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {str(device)!r}, expected one that torch can use: {reason}") from error
    _usable.add(device)
    return torch.device(device)


_usable: set[torch.device | str] = {"cpu", torch.device("cpu"), "meta", torch.device("meta")}


RANDOM_MASKING = declare(
    "random_masking",
    random_masking_reference,
    _by_kernels,
    native_refuses=_native_refuses,
    triton_refuses=_triton_refuses,
)
