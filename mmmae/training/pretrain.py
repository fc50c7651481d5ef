"""Pretrain a masked autoencoder with Lightning, and write everything into the run's folder."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import os
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.plugins.precision import Precision
from torch import distributed

from ..config import MMMAEConfig
from ..data import Normalization
from ..data.loading import lost_workers_told
from ..data.subjects import Subjects
from ..files import check_can_write, check_can_write_file, hold, write_json
from ..model.fast import FastModel, fast_model
from ..precision import resolve_precision, use_tf32
from ..tuning import tune_cpu
from .averages import Average
from .checkpoints import (
    LAST,
    Checkpoint,
    LastCheckpoint,
    WholeCheckpoints,
    check_unchanged,
    describe,
    find_checkpoint,
    remove_partial,
)
from .distributed import World, choose_strategy, cluster_environment, find_world, gather_objects, whole_model
from .graph import graph_refuses
from .module import Pretraining, trains_by_itself
from .pictures import check_rgb, draw, save_figure
from .precision import find_device, precision_plugin
from .progress import StepProgress
from .reports import Pictures, Throughput
from .sampling import SubjectData
from .settings import PretrainSettings

ADVICE = "; the run goes on with --resume auto"  # where a worker was lost

# Warnings of Lightning and PyTorch that do not apply here.
UNFOUNDED = (
    "does not have many workers",  # that is the choice of --workers
    "your dataloader is not resumable",  # the data module keeps the position
    "exists and is not empty", "dirpath", "ckpt_path",  # of a resumed run
    "WeightAveraging callback with a model that overrides",  # ours is not sharded then
    "overridden `transfer_batch_to_device`",
    "returned `None`",  # the step is done, and Lightning only counts it
    "returned a view tensor",  # nothing changes outputs of FSDP2's modules in place
    "LeafSpec",
    "Detected call of `lr_scheduler.step",  # the loss scaler skips a step now and then
)  # fmt: skip


def pretrain(
    config: MMMAEConfig,
    subjects: Subjects,
    out: str | Path,
    settings: PretrainSettings | None = None,
    *,
    resume: str | Path | Checkpoint | None = None,
    rgb: tuple[int, int, int] | None = None,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
) -> FastModel:
    """Pretrain a model and write the run's folder.

    The folder then holds `config.json`, `normalization.json`, `checkpoints/last.ckpt`, `logs/` (CSV, and TensorBoard if
    it is installed), `model/` for `mmmae.FastModel.from_pretrained`, `encoder/` for
    `mmmae.HSIEncoder.from_pretrained`, and `reconstruction.png`. Started by torchrun, the processes train one model
    together, and the first one writes. From here on, the process keeps freed memory, see `mmmae.tune_cpu`, and with
    precision 32 on a GPU with TF32 it multiplies in TF32, see `mmmae.precision.use_tf32`.

    Args:
        config: the model's config, with the bands and modalities of the subjects.
        subjects: a `PairedFolder`, a `Phantom` or any other `Subjects`.
        out: the run's folder.
        settings: None means the defaults.
        resume: a checkpoint to continue from, or `auto` for the one in `out` if there is one. The run then has the
            losses of one that was never stopped, so config, settings, subjects and statistics must be those that it
            was started with. If the run has ended, its results are written again.
        rgb: bands that the picture shows as red, green and blue; None spreads three over the spectrum.
        callbacks: Lightning callbacks of your own, called after those of the run. Their state is kept in checkpoints
            and must be tensors and plain values.
        loggers: Lightning loggers that get the figures of each step too, besides the files in `logs/`.

    Returns:
        The model, with whole weights on every process.

    Raises:
        ValueError: subjects and config do not fit, the folder holds another run or is in use, a checkpoint is broken or
            belongs to another run, or a loss or gradient is not finite.
        OSError: a file can't be read or written.
        ConnectionError: another process of the run is gone.
        ChildProcessError: a worker process that reads data was killed.
        KeyboardInterrupt: the run was interrupted; it can be resumed.

    Example:
        >>> import mmmae
        >>> from mmmae.phantom import Phantom
        >>> from mmmae.training.pretrain import pretrain
        >>> from mmmae.training.settings import PretrainSettings
        >>> subjects = Phantom(4, image_size=32)
        >>> config = mmmae.MMMAEConfig.preset("tiny", image_size=32, bands=subjects.bands, aux=subjects.modalities)
        >>> model = pretrain(config, subjects, "run", PretrainSettings(steps=2, batch=2, warmup=1))
        step 1/2  loss ...
        step 2/2  loss ...
        >>> encoder = mmmae.HSIEncoder.from_pretrained("run/encoder")
        >>> encoder(subjects[0].hsi[None]).shape
        torch.Size([1, 16, 64])
    """
    tune_cpu()
    settings = settings or PretrainSettings()
    out, world = Path(out), find_world()
    _check_subjects(config, subjects, rgb)
    _check_graph(settings, world)
    data = SubjectData(subjects, settings, world.ranks)
    for place in (out, out / "model", out / "encoder"):
        check_can_write(place)
    check_can_write_file(out / "reconstruction.png")
    checkpoint = find_checkpoint(out, resume)
    device = _device(settings, world)
    settings = _with_precision(settings, device, config.dim, checkpoint)
    run = describe(config, settings, world.ranks, subjects.names)
    if checkpoint is not None:
        checkpoint.check_resumes(run)
    normalization = subjects.normalization  # computed before workers start, and before the folder is made
    _check_normalization(out, normalization, resumed=checkpoint is not None)
    in_tf32 = settings.precision == "32" and use_tf32(device)
    if world.rank == 0 and (device.type != "cpu" or settings.precision != "32"):
        print(f"precision {settings.precision}" + (", matrix products in TF32" if in_tf32 else ""))
    _warn_of_no_contrast(config, settings, world)
    check_memory(config)
    torch.manual_seed(settings.seed)
    model = fast_model(config)
    if checkpoint is not None:
        checkpoint.check_tensors(model)
    with contextlib.ExitStack() as held:
        if checkpoint is not None and checkpoint.is_finished(settings):
            if world.rank == 0:
                held.enter_context(hold(out))
                check_unchanged(out, checkpoint)
            model.load_state_dict(checkpoint.weights)  # the run ended, perhaps before it had written its results
        else:
            folder = RunFolder(out, {**run, "subjects": repr(subjects)}, normalization, checkpoint, held)
            own: list[Callback] = [folder]
            if settings.pictures_every:
                own.append(Pictures(subjects, out / "pictures", settings.pictures_every, settings.seed, rgb))
            trainer = _trainer(out, settings, world, own, checkpoint, callbacks, loggers)
            module = Pretraining(model, settings, run, Throughput(config, settings.precision, world.ranks))
            _fit(trainer, module, data, checkpoint)
            module.run["finished"] = True
            trainer.save_checkpoint(out / LAST)
            if settings.strategy == "fsdp" and world.ranks > 1:
                model = whole_model(model, config)
            if world.ranks > 1:
                trainer.strategy.barrier()
                distributed.destroy_process_group()
        model.eval()
        if world.rank == 0:
            for name, part in (("model", model), ("encoder", model.hsi_encoder())):
                part.save_pretrained(out / name)
                normalization.save(out / name / "normalization.json")
            save_figure(draw(model, subjects, seed=settings.seed, rgb=rgb), out / "reconstruction.png")
    return model


class RunFolder(Callback):
    """Creates and holds the run's folder after every process has accepted its input, and all begin with one step."""

    def __init__(
        self,
        out: Path,
        described: dict[str, Any],
        normalization: Normalization,
        checkpoint: Checkpoint | None,
        held: contextlib.ExitStack,
    ) -> None:
        self.out, self.described, self.normalization, self.held = out, described, normalization, held
        self.checkpoint, self.first = checkpoint, 0 if checkpoint is None else checkpoint.step
        self.precision: str = described["settings"]["precision"]

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Write config, settings and statistics."""
        # After this no process looks for another run in the folder.
        first, precisions = zip(*gather_objects((self.first, self.precision)), strict=True)
        if len(set(first)) > 1:
            raise ValueError(f"the processes begin after the steps {[*first]}; {self.out} must be one folder for all")
        if len(set(precisions)) > 1:  # of `auto` on CPUs that are not alike
            raise ValueError(f"the processes chose the precisions {[*precisions]}; give --precision 32 or bf16")
        if trainer.is_global_zero:
            self.out.mkdir(parents=True, exist_ok=True)
            self.held.enter_context(hold(self.out))
            check_unchanged(self.out, self.checkpoint)
            remove_partial(self.out)
            write_json(self.out / "config.json", self.described)
            self.normalization.save(self.out / "normalization.json")


def _fit(trainer: lightning.Trainer, module: Pretraining, data: SubjectData, checkpoint: Checkpoint | None) -> None:
    with warnings.catch_warnings():
        for message in UNFOUNDED:
            warnings.filterwarnings("ignore", message=f".*{message}.*")
        try:
            path = None if checkpoint is None else checkpoint.path
            with lost_workers_told(ADVICE):
                trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        except SystemExit:  # Lightning's answer to Ctrl-C
            raise KeyboardInterrupt from None
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            if checkpoint is None or module.begun:
                raise
            reason = f"{type(error).__name__} {error}"
            raise ValueError(f"{path}: the run can't go on from it: {reason}") from error
        except RuntimeError as error:
            if distributed.is_initialized() and _tells_of_a_lost_process(error):
                raise ConnectionError(
                    f"another process of the run is gone or hangs ({str(error).splitlines()[0]}); "
                    "start the run again with --resume auto"
                ) from error
            raise


def _tells_of_a_lost_process(error: RuntimeError) -> bool:
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")  # gloo's
    return isinstance(error, distributed.DistError) or any(word in str(error) for word in words)


def check_memory(config: MMMAEConfig) -> None:
    """Raise ValueError if the weights of a model do not fit into the memory of this machine."""
    needed, there = 4 * config.least_parameters, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ValueError(
            f"the weights of the model take {needed / 1e9:.0f} GB, this machine has {there / 1e9:.0f} GB of memory: "
            f"choose a smaller dim, depth, patch or decoder"
        )


def _check_normalization(out: Path, normalization: Normalization, *, resumed: bool) -> None:
    path = out / "normalization.json"
    if resumed and path.exists() and Normalization.load(path) != normalization:
        quoted = shlex.quote(str(path))
        raise ValueError(f"the statistics of the subjects are not those of the run; give --normalization {quoted}")


def _check_graph(settings: PretrainSettings, world: World) -> None:
    """Raise ValueError if a CUDA graph is required and this machine or run can't record one."""
    if settings.cuda_graph != "on":
        return
    reason = graph_refuses(_device(settings, world))
    if world.ranks > 1:
        reason = f"{world.ranks} processes train together, whose collectives are not recorded"
    if reason is not None:
        raise ValueError(f"cuda_graph is 'on', but {reason}; expected 'auto' or 'off'")


def _check_subjects(config: MMMAEConfig, subjects: Subjects, rgb: tuple[int, int, int] | None) -> None:
    if subjects.bands != config.bands:
        raise ValueError(f"the subjects have {subjects.bands} bands, the config has bands = {config.bands}")
    if dict(subjects.modalities) != dict(config.aux):
        raise ValueError(
            f"the subjects have the modalities {dict(subjects.modalities)}, the config has aux = {dict(config.aux)}"
        )
    check_rgb(rgb, config.bands)


def _warn_of_no_contrast(config: MMMAEConfig, settings: PretrainSettings, world: World) -> None:
    if settings.batch * world.ranks == 1 and config.aux and config.contrastive_weight > 0 and world.rank == 0:
        warnings.warn(
            "with one sample a forward pass the contrastive loss is always 0: it tells the images of a sample from "
            "those of others; a batch of 2 or more has a contrast, a contrastive_weight of 0 does without",
            stacklevel=3,
        )


def _trainer(
    out: Path,
    settings: PretrainSettings,
    world: World,
    own: list[Callback],
    resumed: Checkpoint | None,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
) -> lightning.Trainer:
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    written: list[Logger] = [CSVLogger(out, name="logs", flush_logs_every_n_steps=1)]
    if importlib.util.find_spec("tensorboard") is not None:
        written.append(TensorBoardLogger(out, name="logs", version=written[0].version))
    own = [*own, _checkpoints(out, settings), StepProgress()]
    if settings.ema:
        own.append(Average(_device(settings, world), decay=settings.ema))
    if settings.patience:
        own.append(EarlyStopping("validation_loss", patience=settings.patience, check_finite=False))
    try:
        return _lightning_trainer(settings, world, [*written, *loggers], [*own, *callbacks], WholeCheckpoints(resumed))
    except (MisconfigurationException, ValueError) as error:
        raise ValueError(f"device is {settings.device!r}, which can't be used: {error}") from error


def _with_precision(
    settings: PretrainSettings, device: torch.device, width: int, checkpoint: Checkpoint | None
) -> PretrainSettings:
    """Return the settings with what `auto` stands for: the precision of the run to resume, else the device's best."""
    if settings.precision != "auto":
        return settings
    resumed = None if checkpoint is None else checkpoint.settings.get("precision")
    return dataclasses.replace(settings, precision=resumed or resolve_precision("auto", device, width))


def _precision(settings: PretrainSettings, world: World) -> Precision:
    if settings.precision == "32" or trains_by_itself(settings, world.ranks):  # which casts by itself
        return Precision()
    return precision_plugin(settings.precision, _device(settings, world))


def _device(settings: PretrainSettings, world: World) -> torch.device:
    """Return the device of this process."""
    return find_device(settings.device, world.rank % world.ranks_of_node)


def _checkpoints(out: Path, settings: PretrainSettings) -> LastCheckpoint:
    # After a validation if there is one, so that a resumed run neither misses nor repeats it.
    steps = None if settings.validation else settings.checkpoint_every
    return LastCheckpoint(
        (out / LAST).parent,
        filename=LAST.stem,
        every_n_train_steps=steps,
        every_n_epochs=1 if settings.validation else None,
        save_on_train_epoch_end=False,
        enable_version_counter=False,
    )


def _lightning_trainer(
    settings: PretrainSettings,
    world: World,
    loggers: list[Logger],
    callbacks: list[Callback],
    checkpoints: WholeCheckpoints,
) -> lightning.Trainer:
    validates = settings.validation > 0
    return lightning.Trainer(
        accelerator=settings.device,
        devices=world.ranks_of_node,
        num_nodes=world.nodes,
        strategy=choose_strategy(settings.strategy, world),
        max_steps=settings.steps,
        max_epochs=1,  # one pass of the loader is the whole run
        accumulate_grad_batches=settings.accumulate,
        limit_val_batches=None if validates else 0,
        val_check_interval=min(settings.checkpoint_every, settings.steps) * settings.accumulate if validates else None,
        num_sanity_val_steps=0,
        logger=loggers,
        callbacks=callbacks,
        plugins=[checkpoints, _precision(settings, world), *cluster_environment(world)],
        use_distributed_sampler=False,
        log_every_n_steps=1,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
