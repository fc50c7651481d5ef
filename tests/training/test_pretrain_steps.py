"""Steps of a run: read every few steps, recorded or not, compiled, and stopped at NaN."""

import dataclasses
import math

import pytest
import torch

import mmmae
from mmmae.cli import main
from mmmae.training import pretrain as recipe
from mmmae.training import step as training_step
from mmmae.training.checkpoints import read_checkpoint
from mmmae.training.distributed import compile_blocks
from mmmae.training.pretrain import pretrain
from mmmae.training.settings import PretrainSettings
from tests.emulator.graph import emulate
from tests.training.test_pretrain import CONFIG, logged, losses, phantom

pytestmark = pytest.mark.xdist_group("pretrain steps")  # whose runs are made once
SETTINGS = PretrainSettings(steps=8, batch=2, warmup=2, checkpoint_every=3, report_every=100)


@pytest.fixture
def waits(monkeypatch):
    """Figures are read as from a GPU, each `log_every` steps."""
    monkeypatch.setattr("mmmae.training.module.reading_waits", lambda device: True)


@pytest.fixture(scope="module")
def read_at_once(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    pretrain(CONFIG, phantom(), out, SETTINGS)
    return out


@pytest.mark.usefixtures("waits")
def test_every_step_is_written_however_seldom_figures_are_read(read_at_once, tmp_path):
    pretrain(CONFIG, phantom(), tmp_path, dataclasses.replace(SETTINGS, log_every=5))
    for name in ("loss", "loss_reconstruction", "loss_contrastive", "gradient_norm", "learning_rate"):
        assert logged(tmp_path, name) == logged(read_at_once, name), name
        assert sorted(logged(tmp_path, name)) == list(range(8))
    # At the checkpoints behind steps 3 and 6, at the reading behind step 5, and at the end.
    speeds = list(logged(tmp_path, "samples_per_second").values())
    assert [speeds.count(speed) for speed in dict.fromkeys(speeds)] == [3, 2, 1, 2]


def broken_forward(monkeypatch, number):
    """Make the loss of a forward pass of the run NaN, with its gradients."""
    forward = mmmae.FastModel.forward

    def broken(self, *arguments, seed):
        output = forward(self, *arguments, seed=seed)
        return output._replace(loss=output.loss * math.nan) if int(seed) == number else output

    monkeypatch.setattr(mmmae.FastModel, "forward", broken)


@pytest.mark.usefixtures("waits")
def test_a_loss_that_is_not_finite_is_named_by_its_step_when_it_is_read_later(tmp_path, monkeypatch):
    shown = []

    class Watched(type(phantom())):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            shown.append(sample.name)
            return sample

    broken_forward(monkeypatch, 3)
    settings = dataclasses.replace(SETTINGS, checkpoint_every=2, log_every=5)
    with pytest.raises(ValueError, match="the loss is nan in step 4, of") as raised:
        pretrain(CONFIG, Watched(5, 32, 12), tmp_path, settings)
    assert f"of {shown[6]}, {shown[7]}; the largest activation is" in str(raised.value)
    assert shown[-2:] == shown[6:8]  # read again to look at their activations
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 2  # the one due behind the broken step was not written
    assert sorted(losses(tmp_path)) == [0, 1, 2]


def test_a_broken_pass_of_an_accumulated_step_stops_the_run(tmp_path, monkeypatch):
    broken_forward(monkeypatch, 5)
    with pytest.raises(ValueError, match=r"the loss is nan in step 3, of (phantom-[^,]*(, )?){4};"):
        pretrain(CONFIG, phantom(), tmp_path, dataclasses.replace(SETTINGS, accumulate=2))


@pytest.mark.parametrize(
    "changes", [{}, {"accumulate": 2, "ema": 0.9}, {"precision": "bf16", "validation": 2}], ids=str
)
@pytest.mark.usefixtures("waits")
def test_a_recorded_run_has_the_losses_of_one_without_a_graph_and_goes_on_with_them(tmp_path, monkeypatch, changes):
    monkeypatch.setenv("MMMAE_KERNELS", "eager")  # kernels of which the emulation sees the operations
    monkeypatch.setattr(recipe, "Throughput", lambda *arguments: None)
    monkeypatch.setattr(training_step, "graph_refuses", lambda device: None)
    make = training_step.TrainingStep.__init__

    def with_rates_in_memory(self, model, optimizer, **options):
        make(self, model, optimizer, **options)
        self._rates = [torch.zeros(()) for _ in optimizer.param_groups]

    monkeypatch.setattr(training_step.TrainingStep, "__init__", with_rates_in_memory)
    log = emulate(monkeypatch)
    settings = dataclasses.replace(SETTINGS, steps=12, checkpoint_every=6, **changes)
    without = pretrain(CONFIG, phantom(), tmp_path / "without", dataclasses.replace(settings, cuda_graph="off"))
    assert log == []
    model = pretrain(CONFIG, phantom(), tmp_path / "recorded", settings)
    assert log.count("replay") >= 9
    assert losses(tmp_path / "recorded") == losses(tmp_path / "without")
    subjects = phantom()
    subjects.left = 2 * (10 * settings.accumulate + (1 if settings.validation else 0)) + 1
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(CONFIG, subjects, tmp_path / "cut", settings)
    resumed = pretrain(CONFIG, phantom(), tmp_path / "cut", settings, resume="auto")
    undisturbed = losses(tmp_path / "without")
    assert losses(tmp_path / "cut", 1) == {step: undisturbed[step] for step in range(6, 12)}
    for name, parameter in without.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_a_graph_that_is_asked_for_and_can_not_be_is_refused_before_anything_is_written(tmp_path, capsys):
    with pytest.raises(ValueError, match="cuda_graph is 'on', but the model is on the device cpu"):
        pretrain(CONFIG, phantom(), tmp_path / "run", dataclasses.replace(SETTINGS, device="cpu", cuda_graph="on"))
    assert not (tmp_path / "run").exists()
    assert main(["pretrain", "--out", str(tmp_path / "run"), "--device", "cpu", "--cuda-graph", "on"]) != 0
    assert "cuda_graph is 'on', but the model is on the device cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "mode"),
    [([], None), (["--compile"], "default"), (["--compile", "max-autotune"], "max-autotune"), (["--no-compile"], None)],
    ids=str,
)
def test_compile_takes_a_mode(tmp_path, monkeypatch, flags, mode):
    made = []
    monkeypatch.setattr("mmmae.cli.pretrain.training_subjects", lambda *arguments, **options: phantom())
    monkeypatch.setattr("mmmae.training.pretrain.pretrain", lambda *arguments, **options: made.append(arguments[3]))
    assert main(["pretrain", "--out", str(tmp_path / "run"), *flags]) == 0
    assert made[0].compile_mode == mode
    assert made[0].graph_refused == (
        "compile is 'max-autotune', which records CUDA graphs of its own" if mode == "max-autotune" else None
    )


def test_every_block_is_compiled_in_the_mode(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: modes.append((type(self).__name__, mode)))
    compile_blocks(mmmae.fast_model(CONFIG), "max-autotune-no-cudagraphs")
    assert set(modes) == {("Block", "max-autotune-no-cudagraphs")}
    assert len(modes) == CONFIG.depth + CONFIG.decoder_depth
