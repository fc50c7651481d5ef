"""`mmmae pretrain`: train a masked autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ..config import MMMAEConfig, Preset, Target
from ..training.settings import PretrainSettings
from .options import (
    DataOptions,
    Fields,
    Flag,
    GeneratedOptions,
    check_bands,
    colours,
    config_fields,
    config_without_bands,
    open_subjects,
    own_choice,
)
from .output import say
from .stored import Stored

if TYPE_CHECKING:
    from ..data.subjects import Subjects


def run(
    data: DataOptions,
    generated: GeneratedOptions,
    settings: Annotated[Callable[..., PretrainSettings], tyro.conf.arg(constructor=PretrainSettings)],
    *,
    preset: Preset | None = None,
    target: Target | None = None,
    wavelength_positions: Flag = False,
    fields: Fields,
    out: Path | None = None,
    resume: str | None = None,
    config: Path | None = None,
    rgb: tuple[int, ...] | None = None,
    no_compile: Flag = False,
    stored: Stored,
) -> None:
    """Pretrain a model.

    Without --hsi, --cache or --shards the subjects are generated (a retina-like phantom, not real data).

    Args:
        preset: the model; None: that of --config, else tiny for generated subjects and base for others
        target: what the decoder predicts; None: pixels for generated subjects, embedding for others
        wavelength_positions: make position embeddings from the wavelengths, to use the encoder with other sensors
        fields: change a config field, as in image_size=64 or patch=3,8,8
        out: the run's folder; None: runs/pretrain, then runs/pretrain-2, ...
        resume: checkpoint to resume from; auto: that of --out or else of the last run, if there is one
        config: JSON or YAML file with model and settings, as config.json in a run's folder; options override it
        rgb: bands that the picture shows as red, green and blue
        no_compile: the same as --compile off
        stored: what the files of --resume and --config hold
    """
    from ..training.distributed import find_world
    from ..training.folders import default_folder
    from ..training.pretrain import pretrain

    shown = colours(rgb)
    chosen = settings(compile=False) if no_compile else settings()
    changes = config_fields(fields)
    _check_fields(changes, data)
    name = preset or ("base" if data.is_named else "tiny")
    source = f"preset {name}"
    if stored.model and preset is None:
        from_data = ("aux", "in_channels", *(("bands",) if data.is_named else ()))
        changes = {**{field: value for field, value in stored.model.items() if field not in from_data}, **changes}
        source = f"model of {config}"
    if target is not None:
        changes["target"] = target
    elif not data.is_named:
        changes.setdefault("target", "pixels")  # so that the picture of the demonstration shows pixels
    out = out or default_folder(Path("runs/pretrain"), resume)
    statistics = None if resume is None else out / "normalization.json"
    subjects = training_subjects(data, generated, name, changes, seed=chosen.seed, normalization=statistics)
    if wavelength_positions:
        changes["wavelengths"] = _known_wavelengths(subjects)
    model = MMMAEConfig.preset(name, **{**changes, "bands": subjects.bands, "aux": dict(subjects.modalities)})
    world = find_world()
    if world.rank == 0:
        of_ranks = f" on each of {world.ranks} processes" if world.ranks > 1 else ""
        course = f"{chosen.steps} steps of {chosen.batch * chosen.accumulate} subjects{of_ranks}"
        say(repr(subjects))
        say(f"{source}, {course}, into {out}")
    try:
        pretrain(model, subjects, out, chosen, resume=stored.checkpoint, rgb=shown)
    except KeyboardInterrupt:
        if not (out / "config.json").exists():  # there is no run yet
            raise
        raise KeyboardInterrupt("the run goes on with --resume auto") from None
    if world.rank == 0:
        written = ("model", "encoder", "reconstruction.png")
        say("wrote " + ", ".join(str(out / name) for name in written))


def training_subjects(
    data: DataOptions,
    generated: GeneratedOptions,
    preset: str,
    fields: Mapping[str, Any],
    *,
    seed: int,
    normalization: Path | None = None,
) -> Subjects:
    """Open the data set that the options name, or generate subjects, at the size that preset and fields give."""
    if not data.is_named:
        config = MMMAEConfig.preset(preset, **fields)
        return open_subjects(data, config.image_size, config.bands, generated=generated, seed=seed)
    known = {field: value for field, value in fields.items() if field != "wavelengths"}  # as many as the files' bands
    config = config_without_bands(preset, known)
    bands = config.patch[0]
    subjects = open_subjects(
        data,
        config.image_size,
        generated=generated,
        normalization=normalization,
        band_multiple=bands,
        choice=own_choice(normalization),
    )
    check_bands(subjects, bands)
    return subjects


def _check_fields(fields: Mapping[str, Any], data: DataOptions) -> None:
    """Raise ValueError where --set names a field that follows from the data."""
    for field, source in (("aux", "--aux"), ("in_channels", "cubes, which have one")):
        if field in fields:
            raise ValueError(f"--set {field} can't be chosen: it follows from {source}")
    if "bands" in fields and data.is_named:
        raise ValueError("--set bands can't be chosen: it follows from the cubes, or from --bands")


def _known_wavelengths(subjects: Subjects) -> list[float]:
    if subjects.wavelengths is None:
        raise ValueError(
            "--wavelength-positions needs the wavelengths of the bands, which the files do not tell; give them by "
            "--set wavelengths=NM,..."
        )
    return [float(wavelength) for wavelength in subjects.wavelengths]
