"""A progress bar of training steps, with loss, throughput and remaining time."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .module import Pretraining

LINES = 10  # printed during a run if there is no terminal to draw a bar on


class StepProgress(Callback):
    """Draws a bar on a terminal, or prints ten lines elsewhere, with the figures of the last reading."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.progress: Progress | None = None
        self.shown = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the bar at the first step of the run."""
        self.shown = trainer.global_step
        if not trainer.is_global_zero or not self.console.is_terminal:
            return
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"))
        self.progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
        self.progress.start()
        self.progress.add_task("", total=trainer.max_steps, completed=trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Advance by a step if one is complete."""
        assert isinstance(pl_module, Pretraining)
        figures, step = pl_module.last, trainer.global_step
        if step == self.shown:
            return
        self.shown = step
        shown = {"loss": "loss {:.4f}", "samples_per_second": "{:.1f} samples/s"}
        text = ", ".join(form.format(figures[name]) for name, form in shown.items() if name in figures)
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=step, description=text)
        elif trainer.is_global_zero and (step % max(trainer.max_steps // LINES, 1) == 0 or step == trainer.max_steps):
            self.console.print(f"step {step}/{trainer.max_steps}  {text}".rstrip(), highlight=False)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Stop the bar, after an exception too."""
        if self.progress is not None:
            self.progress.stop()
