"""What a GPU computes against float64: every op and backend, small and at the shapes of models, in every type."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bench.op_cases import CASES as MODEL_SHAPES
from bench.op_race import TOLERANCE, relative_error
from bench.op_work import Place, Run
from mmmae_kernels import TokenMask, random_masking, use_backend
from mmmae_kernels.attention.op import BACKENDS
from tests.cases import attention
from tests.cases.case import TYPES, Case, deviations
from tests.cases.ops import CASES

from .records import Records
from .setting import Setting

BATCH = 8  # at the shapes of models
DRY_OPS = ("decoder_tokens", "gelu_linear")  # which Triton's interpreter runs in a second


def small_cases(records: Records, setting: Setting, types: str, shard: str) -> None:
    """Check the tables of cases that the tests run, those that the emulator runs first.

    Args:
        types: a name of `tests.cases.case.TYPES`.
        shard: `1/4` for the first quarter of the cases.
    """
    place, count = map(int, shard.split("/"))
    cases = [case for case in CASES if case.small or not setting.dry_run]
    mine = cases[len(cases) * (place - 1) // count : len(cases) * place // count]
    if setting.dry_run:
        mine = [case for case in {case.op: case for case in mine}.values() if case.op in DRY_OPS]
    for case in sorted(mine, key=lambda case: not case.small):
        records.attempt(str(case), _check, records, setting, case, types, "triton")
    if place == 1 and types == "fp32":
        records.attempt("random_masking", _check_masks, records, setting)


def attention_cases(records: Records, setting: Setting, types: str) -> None:
    """Check every backend of attention that serves here."""
    for backend in BACKENDS:
        for case in [*attention.CASES, *attention.MASKED][:: 24 if setting.dry_run else 1]:
            records.attempt(f"{case} by {backend}", _check_attention, records, setting, case, types, backend)


def _check_attention(records: Records, setting: Setting, case: Case, types: str, backend: str) -> None:
    with _attention_by(backend):
        try:
            _check(records, setting, case, types, backend)
        except ValueError as error:
            if "does not support this call" not in str(error):
                raise


def _check(records: Records, setting: Setting, case: Case, types: str, backend: str) -> None:
    """Compare a call with its definition in float64, and record the result that is worst."""
    by_torch = contextlib.nullcontext() if backend in BACKENDS else use_backend(setting.backend(TYPES[types].dtype))
    with by_torch:
        found = deviations(case, TYPES[types], device=setting.device)
    worst = max(found, key=lambda one: one.error / max(one.allowed, 1e-300))
    _note(records, str(case), case.op, backend, types, [(one.error, one.allowed) for one in found], worst.place)


def _note(
    records: Records, what: str, op: str, backend: str, types: str, found: Sequence[tuple[float, float]], place: int
) -> None:
    ok = all(error <= allowed for error, allowed in found)
    error, allowed = found[place]
    records.add(
        "check", what=what, op=op, backend=backend, types=types, error=error, allowed=allowed, result=place, ok=ok
    )


def _check_masks(records: Records, setting: Setting) -> None:
    """Compare masks with those of the definition, of which no bit may differ."""
    for tokens in (1, 7, 65) if setting.dry_run else (1, 7, 784, 4097):
        found = [_mask(setting, tokens, backend) for backend in ("eager", setting.backend(torch.float32))]
        wrong = sum(int((ours != theirs).sum()) for ours, theirs in zip(*found, strict=True))
        what = f"random_masking: {tokens} tokens"
        _note(records, what, "random_masking", "triton", "int64", [(float(wrong), 0.0)], 0)


def _mask(setting: Setting, tokens: int, backend: str) -> TokenMask:
    with use_backend(backend):
        return random_masking(3, tokens, tokens // 4, seed=5, device=setting.device)


def model_shapes(records: Records, setting: Setting, types: str) -> None:
    """Check every op, and every backend of attention that serves, at the shapes of `base`."""
    for op in setting.ops(MODEL_SHAPES):
        what = f"{op} at the shapes of base"
        records.attempt(what, _check_model_shape, records, setting, op, what, types)


def _check_model_shape(records: Records, setting: Setting, op: str, what: str, types: str) -> None:
    dtype, autocast = TYPES[types]
    given = torch.float32 if autocast else dtype
    setup, (baseline, *_) = MODEL_SHAPES[op]

    def variants(place: Place) -> Mapping[str, Run]:
        torch.manual_seed(0)
        return setup(setting.batch(BATCH), place).variants

    truth = variants(Place(setting.device, torch.float64, given))[baseline]()
    with torch.autocast(setting.device, dtype) if autocast else contextlib.nullcontext():
        made = variants(Place(setting.device, given))
    rounding = TOLERANCE if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    allowed = [max(2 * error, rounding) for error in _errors(made[baseline](), truth)]
    for backend in setting.ours(made, op):
        found = list(zip(_errors(made[backend](), truth), allowed, strict=True))
        worst = max(range(len(found)), key=lambda place: found[place][0] / found[place][1])
        _note(records, what, op, backend, types, found, worst)


def _errors(found: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    return [relative_error(ours, exact) for ours, exact in zip(found, truth, strict=True)]


@contextlib.contextmanager
def _attention_by(backend: str) -> Iterator[None]:
    before = os.environ.get("MMMAE_ATTENTION")
    os.environ["MMMAE_ATTENTION"] = backend
    try:
        yield
    finally:
        del os.environ["MMMAE_ATTENTION"]
        if before is not None:
            os.environ["MMMAE_ATTENTION"] = before
