"""Random calls of every public function: valid ones against definitions in float64, invalid ones against their errors.

A call is determined by the function's name and a seed. A failure prints the command that repeats it:

    python -m tests.fuzz.calls patch_embed 123            a valid call
    python -m tests.fuzz.calls patch_embed 123 --wrong    the same call with one argument replaced by an invalid one
"""

from __future__ import annotations

import contextlib
import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

import mmmae_kernels
from mmmae_kernels import use_backend
from tests.fuzz.arguments import Arguments
from tests.fuzz.definitions import Rounding, rounded, step
from tests.fuzz.draw import Draw
from tests.fuzz.ops import OPS, Op

# Triton kernels run here in the interpreter alone, with TRITON_INTERPRET=1; it rounds and multiplies bfloat16 wrongly.
BACKENDS = [name for name, answer in mmmae_kernels.explain("patch_embed").items() if answer == "serves"]


class Failure(AssertionError):
    """A call that gave a wrong result or a wrong error; the message says how to repeat it."""


def check_right_call(name: str, seed: int) -> int:
    """Compare a call's results and gradients with the definition, on each backend that takes it.

    An error is at most twice that of the definition in the call's own types, and a floor: eight times what the exact
    result moves by where each input and each step is rounded at random. (The first is too strict alone: PyTorch's
    expression is sometimes right by luck, and another order of the same steps is not wrong.)

    Returns:
        How many backends took it.
    """
    op, draw = OPS[name], Draw(seed)
    arguments, half = as_under_autocast(op, op.draw(draw), seed)
    asked = [
        key for key, value in arguments.items() if is_floating(value) and key not in op.constant and draw.flag(0.8)
    ]
    if draw.flag(0.7):  # which no fused loss differentiates: most calls should be served by all backends
        asked = [key for key in asked if name not in ("masked_l2_loss", "patch_l2_loss") or key == "prediction"]
    plain = {key: value.clone() if isinstance(value, Tensor) else value for key, value in arguments.items()}
    incoming = Incoming(seed)
    truth = results(op.define, exact(plain), asked, incoming)
    theirs = results(op.define, plain, asked, incoming, half)
    dtypes = [value.dtype for value in floats_of(plain)] + ([] if half is None else [half])
    eps = max([torch.finfo(dtype).eps for dtype in dtypes], default=0.0)
    moved = [moved_results(op, plain, asked, incoming, eps, number) for number in range(3)]
    served = 0
    for backend in backends_of(op):
        if backend == "triton" and torch.bfloat16 in dtypes:
            continue
        under = "" if half is None else f" under autocast in {half}"
        context = f"{name}({described(arguments)}){under} by {backend}, gradients of {asked}"
        try:
            with use_backend(backend):
                chosen = {"backend": backend} if op.chooses else {}
                given = {**arguments, **chosen}
                ours = results(lambda **given: listed(op.call(**given)), given, asked, incoming, half)
        except Exception as error:
            if isinstance(error, ValueError) and backend != "eager" and "does not support this call: " in str(error):
                continue
            raise Failure(f"{context}: {type(error).__name__}: {error}{again(name, seed)}") from error
        served += 1
        for place, (label, wanted) in enumerate(truth.items()):
            value, plainly = ours[label], theirs[label]
            if value.shape != wanted.shape or value.dtype != plainly.dtype:
                raise Failure(
                    f"{context}: {label} is {value.dtype} {list(value.shape)}, "
                    f"expected {plainly.dtype} {list(wanted.shape)}{again(name, seed)}"
                )
            error_size, norm = distance(value, wanted), float(wanted.double().nan_to_num().norm())
            sensitivity = max(distance(run[label], wanted) for run in moved)
            bound = 2 * distance(plainly, wanted) + 8 * sensitivity + smallest(value.dtype) * wanted.numel() ** 0.5
            if not error_size <= bound:
                raise Failure(
                    f"{context}: {label} (result {place}) is off by {error_size:.2e} of {norm:.2e}, "
                    f"expected at most {bound:.2e}{again(name, seed)}"
                )
    return served


class Incoming:
    """Incoming gradients of random layout, the same for every implementation of a call."""

    def __init__(self, seed: int, rounding: Callable[[Tensor], Tensor] | None = None) -> None:
        self.seed, self.rounding = seed, rounding

    def __call__(self, output: Tensor, place: int) -> Tensor:
        draw = Draw(self.seed * 31 + place)
        # Numbers of every type, so that no conversion rounds.
        values = draw.floats(*output.shape, dtype=torch.bfloat16).half().double().to(output.dtype)
        return draw.laid_out(values if self.rounding is None else self.rounding(values))


def moved_results(
    op: Op, arguments: Arguments, asked: Sequence[str], incoming: Incoming, eps: float, number: int
) -> dict[str, Tensor]:
    """Return the results in float64 where each input, each step and each result is rounded at random."""
    with rounded(eps, number):

        def define(**given: Any) -> Sequence[Tensor]:
            floating = {key: step(value) for key, value in given.items() if is_floating(value)}
            return [step(output) if output.is_floating_point() else output for output in op.define(**given | floating)]

        return results(define, exact(arguments), asked, Incoming(incoming.seed, Rounding(eps, number)))


def backends_of(op: Op) -> list[str]:
    """Return the backends that run here; attention has none of Triton."""
    return [name for name in BACKENDS if not (op.chooses and name == "triton")]


def as_under_autocast(op: Op, arguments: Arguments, seed: int) -> tuple[Arguments, torch.dtype | None]:
    """Return the arguments and None; for some of the calls in float32, products in a half dtype, and that dtype."""
    chance = random.Random(f"autocast {seed}")
    dtypes = {value.dtype for value in floats_of(arguments)}
    if dtypes != {torch.float32} or chance.random() < 0.7:
        return arguments, None
    half = chance.choice((torch.bfloat16, torch.float16))
    products = {key: arguments[key].to(half) for key in op.products if arguments[key] is not None}
    return {**arguments, **products}, half


def results(
    function: Callable[..., Sequence[Tensor]],
    arguments: Arguments,
    asked: Sequence[str],
    incoming: Incoming,
    half: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Return outputs by number and the gradients of the asked arguments; zeros where there is no gradient.

    The function is called under autocast in `half` if that is given.
    """
    leaves = {key: arguments[key].detach().requires_grad_() for key in asked}
    with torch.autocast("cpu", half) if half is not None else contextlib.nullcontext():
        outputs = list(function(**{**arguments, **leaves}))
    found = {f"output {place}": output.detach() for place, output in enumerate(outputs)}
    live = [(output, incoming(output, place)) for place, output in enumerate(outputs) if output.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if live and leaves:
        tensors, upstream = zip(*live, strict=True)
        grads = torch.autograd.grad(tensors, list(leaves.values()), upstream, allow_unused=True)
    for (key, leaf), grad in zip(leaves.items(), grads, strict=True):
        found[f"gradient of {key}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


def listed(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def floats_of(arguments: Arguments) -> Iterator[Tensor]:
    return filter(is_floating, arguments.values())


def exact(arguments: Arguments) -> Arguments:
    return {key: value.double() if is_floating(value) else value for key, value in arguments.items()}


def smallest(dtype: torch.dtype) -> float:
    """Return the smallest subnormal number of a floating point dtype, 0 for other dtypes."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def distance(value: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference; NaN, as the mean of no channels, equals NaN."""
    value, wanted = value.double(), wanted.double()
    both = value.isnan() & wanted.isnan()
    return float((value - wanted).masked_fill(both, 0.0).norm())


def again(name: str, seed: int, option: str = "") -> str:
    """Return the part of a message that says how to repeat a call."""
    return f"; again: python -m tests.fuzz.calls {name} {seed}{option}"


def described(arguments: Arguments) -> str:
    return ", ".join(f"{key}={describe(value)}" for key, value in arguments.items())


def describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__name__}:{value!r}"[:80].replace("\n", " ")
    name = str(value.dtype).removeprefix("torch.")
    strides = f" of strides {list(value.stride())}" if value.layout == torch.strided else f" {value.layout}"
    return f"{name}{list(value.shape)}{strides if not value.is_contiguous() else ''}"


def nonsense_for(op: Op, key: str, arguments: Arguments, draw: Draw) -> list[tuple[str, Any]]:
    """Return invalid values of an argument, each with what its error has to name: `itself`, or `some` argument."""
    value = arguments[key]
    wrongs: list[Any]
    anything = [numpy.zeros(3), [1.0, 2.0], "x", object(), {"a": 1}, b"x"]
    if key == "device":
        return [("itself", wrong) for wrong in ("gpu", 1.5, [], numpy.zeros(2), object(), "cpu:x")]
    if key == "seed":
        wrongs = [None, True, 2.5, 2.0, math.nan, -(2**63) - 1, 2**64, torch.tensor(1.0), torch.zeros(2).long()]
        wrongs += [torch.tensor(True), torch.tensor(1j), numpy.float32(2.9), numpy.bool_(True), 1j]
        return [("itself", wrong) for wrong in (*anything, *wrongs)]
    if key in ("batch", "tokens", "keep", "first_sample", "heads"):
        wrongs = [None, True, 2.0, 2.5, math.nan, math.inf, -1, 2**63, torch.tensor(2.9), torch.tensor(True), 1j]
        wrongs += [numpy.float32(2.9), numpy.bool_(True), torch.zeros(2).long()]
        wrongs += [arguments["tokens"] + 1] if key == "keep" else []
        return [("itself", wrong) for wrong in (*anything, *wrongs)]
    if key == "epsilon":
        wrongs = [None, True, math.nan, math.inf, -1.0, -math.inf, torch.zeros(2), 1j]
        return [("itself", wrong) for wrong in (*anything, *wrongs)]
    if key == "normalize":
        return [("itself", wrong) for wrong in (*anything, None, 1, 0.0, torch.zeros(2))]
    if key == "backend":
        return [("itself", wrong) for wrong in (*anything, None, 1, "cuda", torch.zeros(2))]
    if key == "patch":
        one, two, three = value
        wrongs = [None, 3, (one, two), (*value, 1), (one, two, 0), (one, -two, three), (1.5, two, three)]
        wrongs += [(one, two, None), (True, two, three), (one, two, "x"), math.nan, torch.zeros(3), (2**70, two, three)]
        return [("itself", wrong) for wrong in (*anything, *wrongs)]
    found: list[tuple[str, Any]] = [("itself", wrong) for wrong in (*anything, 3, 0.5, True, (), 1j)]
    if key not in op.optional:
        found.append(("itself", None))
    if value is None:
        return found
    plain = value.detach().clone()
    found += [("itself", plain.float().numpy()), ("itself", plain.tolist()), ("itself", [plain])]
    found += [("itself", plain.to(torch.complex64)), ("itself", plain.new_zeros(()))]
    found += [("itself", plain.to_sparse())] if key not in op.unseen else []
    if key not in op.free:
        found += [("some", plain[None]), ("some", plain.flatten() if plain.dim() > 1 else plain[:, None])]
    for axis in op.tied(arguments).get(key, ()):
        shape = list(plain.shape)
        shape[axis] += 1
        found.append(("some", plain.new_zeros(shape)))
    if sum(isinstance(other, Tensor) for other in arguments.values()) > 1:
        found.append(("some", plain.to("meta")))
    if plain.dtype == torch.int64 and key not in op.numeric:
        found += [("itself", plain.to(dtype)) for dtype in (torch.int32, torch.float32, torch.bool, torch.float64)]
        if plain.numel() > 0:
            found += [("itself", plain - 10**6), ("itself", plain + 10**6), ("itself", plain.clamp(max=-1))]
    elif plain.dtype == torch.bool and key not in op.numeric:
        found += [("itself", plain.to(dtype)) for dtype in (torch.uint8, torch.float32, torch.int64)]
    elif key not in op.numeric:
        found += [("some", plain.to(dtype)) for dtype in (torch.int64, torch.int32, torch.bool, torch.uint8)]
        if key in op.alike:
            different = torch.float32 if plain.dtype == torch.float64 else torch.float64
            found.append(("some", plain.to(different)))
    return found


def check_wrong_call(name: str, seed: int) -> None:
    """Replace one argument by an invalid value; a ValueError must name it and say what is expected."""
    op, draw = OPS[name], Draw(seed)
    arguments = op.draw(draw)
    if op.chooses:
        arguments["backend"] = "auto"
    key = draw.random.choice(list(arguments))
    named, wrong = draw.random.choice(nonsense_for(op, key, arguments, draw))
    wrongly = {**arguments, key: wrong}
    kind = draw.random.random()
    if kind < 0.02:
        wrongly = {**arguments, "unknown": 1}
    elif kind < 0.04:
        wrongly = {other: value for other, value in arguments.items() if other != next(iter(arguments))}
    context = f"{name} with {key} = {describe(wrong)} in {described(arguments)}"
    messages = []
    for backend in backends_of(op):
        if op.chooses and key != "backend" and "backend" in wrongly:
            wrongly["backend"] = backend
        try:
            with use_backend(backend):
                op.call(**wrongly)
        except TypeError as error:
            if kind < 0.04:
                continue
            raise Failure(f"{context} by {backend}: TypeError: {error}{again(name, seed, ' --wrong')}") from error
        except ValueError as error:
            messages.append(str(error))
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else ""
            raise Failure(
                f"{context} by {backend}: {type(error).__name__}: {text}{again(name, seed, ' --wrong')}"
            ) from error
        else:
            raise Failure(f"{context} by {backend}: no error{again(name, seed, ' --wrong')}")
    if kind < 0.04:
        return
    command = again(name, seed, " --wrong")
    names = [key] if named == "itself" else [other for other, value in arguments.items() if isinstance(value, Tensor)]
    for message in messages:
        names_it = any(re.search(rf"\b{other}\b", message) for other in names)
        if not names_it or not re.search(r"expected|must be|needs|without", message):
            raise Failure(
                f"{context}: the error names no argument or no rule: {message}{again(name, seed, ' --wrong')}"
            )
    if len(set(messages)) > 1:
        raise Failure(f"{context}: errors differ: {messages}{command}")


def failures(check: Callable[[str, int], Any], name: str, seeds: Iterable[int]) -> list[str]:
    """Return one line for each call that failed."""
    lines = []
    for seed in seeds:
        try:
            check(name, seed)
        except Failure as failure:
            lines.append(str(failure))
    return lines


if __name__ == "__main__":
    (check_wrong_call if "--wrong" in sys.argv else check_right_call)(sys.argv[1], int(sys.argv[2]))
    print("right")
