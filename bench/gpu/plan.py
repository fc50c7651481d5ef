"""The parts of a visit, what each does, and how long it may take."""

from __future__ import annotations

from .visit import Part, Stage

TYPES = ("fp32", "fp16", "bf16", "mixed fp16", "mixed bf16")
STEP_TYPES = ("float32", "bfloat16")
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
    models = [(preset, dtype) for preset in ("tiny", "base") for dtype in STEP_TYPES]
    pieces = [(types, place) for types in TYPES for place in range(1, shards + 1)]
    checks = [
        Part("environment", ("environment",), threads),
        *(Part(f"compilation, {p}, batch {b}", ("compile", p, b), compilers) for p, b in TASKS),
        *(Part(f"one step, {p}, {t}", ("step", p, "4", t), threads) for p, t in models),
        *(Part(f"captured step, {p}, {t}", ("graph", p, "4", t), threads) for p, t in models),
        *(Part(f"shapes of base, {types}", ("shapes", types), threads) for types in TYPES),
        *(Part(f"small cases, {t}, {n} of {shards}", ("small", t, f"{n}/{shards}"), threads) for t, n in pieces),
        *(Part(f"attention, {types}", ("attention", types), threads) for types in TYPES[:3]),
        *(Part(f"counts, {p}, batch {b}", ("counts", p, b), threads) for p, b in TASKS),
    ]
    times = [
        *(Stage((Part(f"steps, {p}, batch {b}", ("steps", p, b)),), 45 if p == "base" else 35) for p, b in TASKS),
        *(Stage((Part(f"ops, batch {batch}", ("ops", batch)),), 40) for batch in ("64", "8")),
        Stage((Part("encoder, base", ("encoder", "base")),), 15),
    ]
    tools = [(tool, types) for tool in ("memcheck", "racecheck") for types in ("fp32", "bf16")]
    last = [Part(f"sanitizer, {tool}, {types}", ("sanitizer", tool, types), threads) for tool, types in tools]
    found = [Stage(tuple(checks), 175), *times, Stage(tuple(last), 50)]
    if only is not None:
        found = [Stage(tuple(part for part in stage.parts if only in part.name), stage.seconds) for stage in found]
    return [stage for stage in found if stage.parts]
