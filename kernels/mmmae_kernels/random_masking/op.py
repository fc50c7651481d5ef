"""Random masking: which tokens of each sample are visible, which are masked, and how to restore their order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import LARGEST, check_whole, described
from ..dispatch import Arguments, Reason, declare, triton_refuses
from ..operators import declare_operator, kernels_for
from .reference import random_masking_reference

LARGEST_TABLE = 2**60  # elements; the number of bytes has to fit 64 bits


class TokenMask(NamedTuple):
    """Token numbers of a batch, int64, of N = K visible + M masked tokens a sample."""

    ids_keep: Tensor  # [B, K] visible tokens, in random order
    ids_masked: Tensor  # [B, M] masked tokens, in random order
    ids_restore: Tensor  # [B, N] index of each token in the concatenation of ids_keep and ids_masked


def random_masking(
    batch: int,
    tokens: int,
    keep: int,
    seed: int | Tensor,
    *,
    device: torch.device | str | None = None,
    first_sample: int = 0,
) -> TokenMask:
    """Draw which tokens of each sample stay visible.

    A sample's mask depends only on the seed, its sample number and `tokens`: it is the same on every backend and
    device, and in every batch.

    Args:
        batch: number of samples B.
        tokens: number of tokens N of a sample, less than 2^32.
        keep: number of visible tokens K, 0..N.
        seed: 64-bit integer or scalar integer tensor, the key of Philox 4x32-10.
        device: device of the result; None means that of a seed tensor, else the CPU.
        first_sample: sample number of the first sample. Ranks that count on draw the masks of a single process.

    Returns:
        The numbers of visible and masked tokens, and the permutation that restores their order.

    Raises:
        ValueError: a count is not an integer in its range, the seed is not a 64-bit integer, or torch can't use the
            device.

    Example:
        >>> mask = random_masking(batch=2, tokens=6, keep=2, seed=0)
        >>> mask.ids_keep.shape, mask.ids_masked.shape
        (torch.Size([2, 2]), torch.Size([2, 4]))
        >>> torch.cat([mask.ids_keep, mask.ids_masked], dim=1).gather(1, mask.ids_restore)[0].tolist()
        [0, 1, 2, 3, 4, 5]
        >>> second = random_masking(batch=1, tokens=6, keep=2, seed=0, first_sample=1)
        >>> torch.equal(mask.ids_keep[1:], second.ids_keep)
        True
    """
    tokens = check_whole("tokens", tokens, 0, 2**32 - 1)
    batch = check_whole("batch", batch)
    if not torch.compiler.is_compiling() and batch * tokens >= LARGEST_TABLE:
        raise ValueError(f"batch is {batch}, expected less than 2^60 tokens in total ({tokens} a sample)")
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
        return f"device is {arguments['device']}, native kernels run on the CPU"
    return None


def _triton_refuses(arguments: Arguments) -> Reason:
    return triton_refuses([("the mask", torch.empty(0, device=arguments["device"]))])


def seed_tensor(seed: int | Tensor) -> Tensor:
    """Return the seed as an int64 scalar tensor, or raise unless it is a 64-bit integer."""
    seed = check_seed(seed)
    if isinstance(seed, Tensor):
        return seed if seed.dtype == torch.int64 else seed.to(torch.int64)
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64)


def check_seed(seed: int | Tensor) -> int | Tensor:
    """Return the seed as an int or a tensor, or raise unless it is a 64-bit integer."""
    if not isinstance(seed, Tensor):
        return check_whole("seed", seed, -(2**63), 2**64 - 1)
    is_integer = not (seed.is_floating_point() or seed.is_complex() or seed.dtype == torch.bool)
    if seed.dim() != 0 or not is_integer or seed.layout is not torch.strided:
        raise ValueError(f"seed is {described(seed)}, expected a scalar integer tensor")
    return seed


def _check_device(device: torch.device | str) -> torch.device:
    """Return the device as a torch.device, or raise unless torch can use it."""
    if not isinstance(device, (str, torch.device)):
        raise ValueError(f"device is {described(device)}, expected a torch.device or a name such as 'cpu'")
    if torch.compiler.is_compiling():
        return torch.device(device)
    if device in _usable:
        return _with_index(torch.device(device))
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # AssertionError: torch is built without support for it
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {str(device)!r}, expected one that torch can use: {reason}") from error
    _usable.add(device)
    return _with_index(torch.device(device))


def _with_index(device: torch.device) -> torch.device:
    """Return the device with its index, so that no choice made for one GPU is taken for another one."""
    is_any = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if is_any else device


_usable: set[torch.device | str] = {"cpu", torch.device("cpu"), "meta", torch.device("meta")}


RANDOM_MASKING = declare(
    "random_masking",
    random_masking_reference,
    _by_kernels,
    native_refuses=_native_refuses,
    triton_refuses=_triton_refuses,
)
