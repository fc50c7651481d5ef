"""No operation of a training step waits for the device, for any config; and the test finds operations that do."""

import contextlib
import sys
import types

import pytest
import torch

import mmmae
from mmmae.data import Batch
from mmmae.training import pretrain as recipe
from mmmae.training.figures import Figures
from mmmae.training.module import Pretraining
from mmmae.training.pretrain import pretrain
from mmmae.training.settings import PretrainSettings
from mmmae_kernels import operators
from mmmae_kernels.gpu.executors import execute_by
from tests.emulator.device_waits import DeviceWaits, HostReads
from tests.training.test_pretrain import CONFIG, SETTINGS, phantom

FIELDS = {"image_size": 32, "patch": (3, 8, 8)}
STEPS = [  # config fields, and how the step is made
    ({}, {}),
    ({"aux": {}}, {}),
    ({"conditioning_dropout": 0.3}, {}),
    ({"conditioning_dropout": 0.3}, {"only": ("thickness",)}),
    ({"conditioning_depth": 0}, {}),
    ({"aux_encoder": "cnn"}, {}),
    ({"decode_fraction": 0.5}, {"valid": True}),
    ({"activation_checkpointing": True}, {}),
    ({"target": "pixels"}, {"valid": True}),
    ({"target": "pixels", "normalize_target": True}, {}),
    ({"normalize_target": True}, {"valid": True}),
    ({"symmetric": True, "contrastive_weight": 0.5}, {}),
    ({"mlp_ratio": 1.0, "depth": 3, "decoder_depth": 2}, {}),
    ({"wavelengths": tuple(400.0 + 10 * band for band in range(12))}, {}),
    ({}, {"size": 40, "valid": True}),
    ({}, {"accumulate": 2}),
    ({}, {"clip": None}),
    ({}, {"autocast": torch.bfloat16}),
]


class AcceptsLaunches:
    """An executor that accepts every launch and runs none."""

    target = "sm90"

    def __call__(self, launch):
        return launch.configs[0]


@pytest.fixture
def meta(monkeypatch):
    """Let meta tensors stand for those of a GPU, without autocast and fused optimizers, which they do not support."""
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    monkeypatch.setattr(sys.modules[torch.optim.Adam.__module__], "_device_dtype_check_for_fused", lambda *_: None)
    monkeypatch.setattr(operators, "needs_operators", lambda tensor: False)  # launchers are what is watched
    with execute_by(AcceptsLaunches()):
        yield


def build(fields):
    with torch.device("meta"):
        return mmmae.FastModel(mmmae.MMMAEConfig.preset("tiny", **{**FIELDS, **fields}), "triton", "sdpa")


def batch_of(config, *, size=32, only=None, valid=False):
    def tensor(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    aux = {name: tensor(2, channels, size, size) for name, channels in config.aux.items()}
    present = {name: tensor(2, dtype=torch.bool) for name in aux}
    aux = {name: image for name, image in aux.items() if only is None or name in only}
    return tensor(2, 1, 12, size, size), aux, present, tensor(2, size, size, dtype=torch.bool) if valid else None


def waits_of_steps(fields=None, *, accumulate=1, clip=1.0, autocast=None, **batch):
    model = build(fields or {})
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = mmmae.TrainingStep(model, optimizer, clip=clip, accumulate=accumulate, autocast=autocast)
    with DeviceWaits() as watch:
        for _ in range(2 * accumulate):
            step(*batch_of(model.config, **batch))
    assert watch.operations > 1000
    return watch.found


@pytest.mark.parametrize(("fields", "options"), STEPS, ids=str)
def test_a_training_step_does_not_wait_for_the_device(meta, fields, options):
    assert waits_of_steps(fields, **options) == []


@pytest.mark.parametrize("seed", [None, 7], ids=["drawn", "given"])
def test_a_forward_pass_with_a_seed_from_the_host_does_not_wait_either(meta, seed):
    model = build({"conditioning_dropout": 0.3})
    with DeviceWaits() as watch:
        model(*batch_of(model.config), seed=seed).loss.backward()
    assert watch.found == []


PLANTED = {
    "item": lambda loss: loss.item(),
    "bool": lambda loss: bool(loss > 0),
    "tolist": lambda loss: loss[None].tolist(),
    "cpu": lambda loss: loss.cpu(),
    "nonzero": lambda loss: loss[None][torch.ones(1, dtype=torch.bool, device="meta")],
    "tensor": lambda loss: torch.tensor(1.0, device="meta"),
    "to": lambda loss: torch.ones(()).to("meta"),
    "list": lambda loss: loss[None][[0]],
    "copy": lambda loss: loss.detach().copy_(torch.ones(())),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_wait_put_in_on_purpose_is_found(meta, monkeypatch, name):
    def waiting(self, output, *, first):
        with contextlib.suppress(NotImplementedError, RuntimeError):  # meta tensors have no values to select by
            PLANTED[name](output.loss)
        return add_pass(self, output, first=first)

    add_pass = Figures.add_pass
    monkeypatch.setattr(Figures, "add_pass", waiting)
    found = waits_of_steps()
    assert len(found) == 2  # once a step
    assert all(wait.where.startswith("tests/model/test_device_waits.py") for wait in found)


@pytest.mark.parametrize("ranks", ["one process", "several"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_recipe_does_not_wait_between_readings(meta, monkeypatch, ranks, accumulate):
    model = build({"conditioning_dropout": 0.3})
    settings = PretrainSettings(steps=100, accumulate=accumulate, log_every=50, report_every=90)
    module = Pretraining(model, settings, {})
    optimizer = module.configure_optimizers()["optimizer"]
    monkeypatch.setattr(Pretraining, "optimizers", lambda self, **options: optimizer)
    monkeypatch.setattr(Pretraining, "device", torch.device("meta"))
    monkeypatch.setattr(Pretraining, "trainer", types.SimpleNamespace(world_size=1, training=True))
    monkeypatch.setattr(Pretraining, "global_step", 1)  # the features are measured in step 0
    module.on_train_start()
    if ranks == "several":  # as Lightning makes a step
        module.step, module.figures = None, Figures(torch.device("meta"), settings.log_every, accumulate)
    hsi, aux, present, valid = batch_of(model.config, valid=True)
    batch = Batch(["first", "second"], hsi, aux, present, valid)
    with DeviceWaits() as watch:
        for number in range(2 * accumulate):
            loss = module.training_step(module.transfer_batch_to_device(batch, module.device, 0), number)
            if loss is not None:
                (loss / accumulate).backward()
                if number % accumulate == accumulate - 1:
                    module.configure_gradient_clipping(optimizer)
                    optimizer.step()
    assert watch.operations > 1000
    assert watch.found == []
    assert (loss is None) == (ranks == "one process")


def test_no_part_of_a_run_reads_a_number_between_readings(tmp_path, monkeypatch):
    monkeypatch.setenv("MMMAE_KERNELS", "eager")  # the native kernel reads the seed from memory
    monkeypatch.setattr(recipe, "Throughput", lambda *arguments: None)
    monkeypatch.setattr("mmmae.training.module.reading_waits", lambda device: True)
    watch, counts = HostReads(), []

    def unwatched(name):
        function = getattr(Pretraining, name)

        def call(self, *arguments):
            before = len(watch.found)
            result = function(self, *arguments)
            del watch.found[before:]
            return result

        monkeypatch.setattr(Pretraining, name, call)

    def counted(self, *arguments):
        counts.append(len(watch.found))
        return training_step(self, *arguments)

    def fit_watched(*arguments):
        with watch:
            fit(*arguments)

    fit = recipe._fit
    monkeypatch.setattr(recipe, "_fit", fit_watched)
    for name in ("_read", "_report"):
        unwatched(name)
    training_step = Pretraining.training_step
    monkeypatch.setattr(Pretraining, "training_step", counted)
    settings = PretrainSettings(
        **{**SETTINGS.__dict__, "steps": 7, "log_every": 4, "checkpoint_every": 100, "ema": 0.9, "accumulate": 2}
    )
    pretrain(CONFIG, phantom(), tmp_path, settings)
    # Subjects are ordered and generated on the CPU, whatever trains; ids are checked there alone.
    on_the_cpu = ("mmmae/data/", "mmmae/phantom/", "mmmae/training/sampling.py", "kernels/mmmae_kernels/checks.py")
    reads = [wait for wait in watch.found[counts[0] : counts[-1]] if not wait.where.startswith(on_the_cpu)]
    assert len(counts) == 14
    assert reads == []
