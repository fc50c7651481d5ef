"""The parts of a visit, what each does, and how long it may take."""

from __future__ import annotations

from .visit import Part, Stage

TYPES = ("fp32", "fp16", "bf16", "mixed fp16", "mixed bf16")
TASKS = (("base", "64"), ("base", "8"), ("vit", "64"), ("vit", "8"))


def stages(cores: int, only: str | None = None) -> list[Stage]:
    """Return the stages of a visit: checks side by side, then times, each part alone, then the sanitizer.

    Args:
        cores: of the machine; with many, checks are divided among more processes.
        only: keeps the parts whose name has this in it; None keeps all.
    """
    threads = (("OMP_NUM_THREADS", "2"),)
    compilers = (("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, cores // 4))), *threads)
    shards = max(1, min(3, cores // 5))
    checks = [
        Part("environment", ("environment",), threads),
        *(Part(f"one step, {p}, {t}", ("step", p, "4", t), threads) for p in ("tiny", "base") for t in STEP_TYPES),
        *(
            Part(f"captured step, {p}, {t}", ("graph", p, "4", t), threads)
            for p in ("tiny", "base")
            for t in STEP_TYPES
        ),
        *(Part(f"shapes of base, {types}", ("shapes", types), threads) for types in TYPES),
        *(Part(f"compilation, {p}, batch {b}", ("compile", p, b), compilers) for p, b in TASKS),
        *(
            Part(f"small cases, {types}, {place} of {shards}", ("small", types, f"{place}/{shards}"), threads)
            for types in TYPES
            for place in range(1, shards + 1)
        ),
        *(Part(f"attention, {types}", ("attention", types), threads) for types in TYPES[:3]),
    ]
    times = [
        *(Stage((Part(f"steps, {p}, batch {b}", ("steps", p, b)),), 45 if p == "base" else 35) for p, b in TASKS),
        *(Stage((Part(f"ops, batch {batch}", ("ops", batch)),), 40) for batch in ("64", "8")),
        Stage((Part("encoder, base", ("encoder", "base")),), 15),
    ]
    last = Stage((Part("sanitizer", ("sanitizer",)),), 55)
    found = [Stage(tuple(checks), 150), *times, last]
    if only is not None:
        found = [Stage(tuple(part for part in stage.parts if only in part.name), stage.seconds) for stage in found]
    return [stage for stage in found if stage.parts]


STEP_TYPES = ("float32", "bfloat16")
