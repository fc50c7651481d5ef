"""Callbacks and loggers of a user's own, in pretraining and fine-tuning."""

from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger

import mmmae
from mmmae.phantom import Phantom
from mmmae.training.checkpoints import read_checkpoint
from mmmae.training.finetuning.finetune import finetune
from mmmae.training.finetuning.labels import read_class_labels
from mmmae.training.finetuning.settings import FinetuneSettings
from mmmae.training.pretrain import pretrain
from mmmae.training.settings import PretrainSettings

CONFIG = mmmae.MMMAEConfig.preset("tiny", image_size=32, patch=(3, 8, 8), target="pixels")


class Counts(Callback):
    """Counts steps, and keeps the count and `extra` in checkpoints."""

    def __init__(self, extra=None):
        self.count, self.extra = 0, extra

    def on_train_batch_end(self, *arguments):
        self.count += 1

    def state_dict(self):
        return {"count": self.count, "extra": self.extra}

    def load_state_dict(self, state):
        self.count = state["count"]


class Memory(Logger):
    """Keeps what it is told."""

    name, version = "memory", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *arguments, **options):
        pass


def steps(memory, name="loss"):
    return [step for step, row in memory.rows if name in row]


def test_callbacks_and_loggers_see_every_step_and_go_on_with_a_resumed_run(tmp_path):
    subjects, settings = Phantom(4, image_size=32), PretrainSettings(steps=4, batch=2, checkpoint_every=2)
    counts, memory = Counts(), Memory()
    kept = ModelCheckpoint(tmp_path / "own", filename="newest", every_n_train_steps=1, enable_version_counter=False)

    class Stops(Callback):
        def on_train_batch_end(self, trainer, *arguments):
            if trainer.global_step == 3:
                raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(CONFIG, subjects, tmp_path / "run", settings, callbacks=[kept, counts, Stops()], loggers=[memory])
    assert counts.count == 3
    assert steps(memory) == [0, 1, 2]
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["newest.ckpt"]
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 2
    counts, memory = Counts(), Memory()
    pretrain(CONFIG, subjects, tmp_path / "run", settings, resume="auto", callbacks=[counts], loggers=[memory])
    assert counts.count == 4
    assert steps(memory) == [2, 3]
    assert (tmp_path / "run" / "logs" / "version_0" / "metrics.csv").exists()


def test_a_state_that_could_not_be_read_back_is_refused_at_the_first_checkpoint(tmp_path):
    settings = PretrainSettings(steps=2, batch=2, checkpoint_every=1)
    with pytest.raises(ValueError, match=r"callbacks\['Counts'\]\['extra'\] is a SimpleNamespace, expected tensors"):
        pretrain(CONFIG, Phantom(2, image_size=32), tmp_path, settings, callbacks=[Counts(SimpleNamespace())])


def test_fine_tuning_has_them_too(tmp_path):
    subjects = Phantom(4, image_size=32)
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["name,label", *(f"{name},{index % 2}" for index, name in enumerate(subjects.names))]))
    encoder = mmmae.fast_model(CONFIG).hsi_encoder()
    counts, memory = Counts(), Memory()
    settings = FinetuneSettings(epochs=2, batch=2)
    own = {"callbacks": [counts], "loggers": [memory]}
    finetune(encoder, subjects, read_class_labels(table, subjects), tmp_path / "run", settings, validation=0.5, **own)
    assert counts.count == 2
    assert len(steps(memory)) >= 2
