"""Pretraining runs: what they write, that they stop and go on, and what they refuse."""

import csv
import dataclasses
import functools
import math
import shutil
from pathlib import Path

import pytest
import torch

import mmmae
from mmmae.data import Normalization
from mmmae.phantom import Phantom
from mmmae.training.checkpoints import read_checkpoint
from mmmae.training.finetuning.labelled import Order
from mmmae.training.pictures import draw
from mmmae.training.pretrain import Pretraining, pretrain
from mmmae.training.sampling import StepSampler
from mmmae.training.settings import PretrainSettings

pytestmark = pytest.mark.xdist_group("pretrain")  # whose runs are made once
CONFIG = mmmae.MMMAEConfig.preset("tiny", image_size=32, patch=(3, 8, 8), target="pixels", conditioning_dropout=0.2)
SETTINGS = PretrainSettings(steps=9, batch=2, warmup=2, checkpoint_every=3)


class StopsAfter(Phantom):
    """A phantom whose reading fails at a given access, as a power cut would."""

    left = 10**9

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("power cut")
        return super().__getitem__(index)


phantom = functools.partial(StopsAfter, 5, 32, 12)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, pretrain(CONFIG, phantom(), out, SETTINGS)


def losses(out, version=0):
    return logged(out, "loss", version)


def logged(out, name, version=0):
    with (out / "logs" / f"version_{version}" / "metrics.csv").open() as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


def test_a_run_leaves_all_it_promises(finished):
    out, model = finished
    assert sorted(losses(out)) == list(range(9))
    for name in ("config.json", "normalization.json", "checkpoints/last.ckpt", "reconstruction.png"):
        assert (out / name).stat().st_size > 0, name
    assert not [path for path in out.rglob("*") if path.name.endswith(".partial")]
    encoder = mmmae.HSIEncoder.from_pretrained(out / "encoder")
    assert torch.equal(encoder.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_a_resumed_run_has_the_losses_of_an_undisturbed_one(finished, tmp_path):
    out, model = finished
    subjects = phantom()
    subjects.left = 2 * 7 + 1  # in the eighth step, two steps behind the last checkpoint
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(CONFIG, subjects, tmp_path, SETTINGS)
    resumed = pretrain(CONFIG, phantom(), tmp_path, SETTINGS, resume="auto")
    assert sorted(losses(tmp_path, 1)) == [6, 7, 8]
    undisturbed = losses(out)
    for step, loss in losses(tmp_path, 1).items():
        assert loss == undisturbed[step]
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_resume_auto_without_a_checkpoint_begins_anew(finished, tmp_path):
    out, _ = finished
    pretrain(CONFIG, phantom(), tmp_path, SETTINGS, resume="auto")
    assert losses(tmp_path) == losses(out)


def test_workers_do_not_change_the_run(finished, tmp_path):
    out, _ = finished
    settings = PretrainSettings(steps=9, batch=2, warmup=2, checkpoint_every=3, workers=2)
    pretrain(CONFIG, phantom(), tmp_path, settings)
    assert losses(tmp_path) == losses(out)


def test_a_picture_is_drawn_where_a_part_is_decoded(tmp_path):
    config = CONFIG.replace(target="embedding", decode_fraction=0.5, activation_checkpointing=True)
    pretrain(config, phantom(), tmp_path, PretrainSettings(steps=1, batch=1, warmup=0))
    assert (tmp_path / "reconstruction.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_run_is_not_overwritten(finished):
    out, _ = finished
    with pytest.raises(ValueError, match="holds a run already"):
        pretrain(CONFIG, phantom(), out, SETTINGS)


def test_a_contrast_with_nobody_is_said(tmp_path):
    with pytest.warns(UserWarning, match="with one sample a forward pass the contrastive loss is always 0"):
        pretrain(CONFIG, Phantom(1, 32, 12), tmp_path, PretrainSettings(steps=1, batch=1, warmup=0))


def test_a_batch_larger_than_the_folder_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="batch is 6, expected at most the number of subjects, 5"):
        pretrain(CONFIG, phantom(), tmp_path / "run", PretrainSettings(batch=6))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "no whole checkpoint: it is no zip archive, or its end is missing"),
        (lambda data: b"", "no whole checkpoint: it is no zip archive, or its end is missing"),
        (lambda data: data[: len(data) // 2] + data[len(data) // 2 + 4096 :], "no whole checkpoint: "),
    ],
    ids=["truncated", "empty", "a piece missing"],
)
def test_a_broken_checkpoint_is_refused_before_anything_is_written(finished, tmp_path, damage, message):
    out, _ = finished
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(damage((out / "checkpoints" / "last.ckpt").read_bytes()))
    with pytest.raises(ValueError, match=message):
        pretrain(CONFIG, phantom(), tmp_path / "run", SETTINGS, resume=broken)
    assert not (tmp_path / "run").exists()


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_does_not_run(finished, tmp_path):
    out, _ = finished
    checkpoint = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["extra"] = Payload(tmp_path / "ran")
    torch.save(checkpoint, tmp_path / "evil.ckpt")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        pretrain(CONFIG, phantom(), tmp_path / "run", SETTINGS, resume=tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that a power cut ended in its eighth step, two steps behind its checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    subjects = phantom()
    subjects.left = 2 * 7 + 1
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(CONFIG, subjects, out, SETTINGS)
    return out


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({"dim": 32}, {}, "dim is 32, but the run of .* has 64"),
        ({"decode_fraction": 0.5}, {}, "decode_fraction is 0.5, but the run of .* has 1.0"),
        ({"mask_ratio": 0.5}, {}, "mask_ratio is 0.5, but the run of .* has 0.75"),
        ({}, {"steps": 12}, "steps is 12, but the run of .* has 9"),
        ({}, {"batch": 1}, "batch is 1, but the run of .* has 2"),
        ({}, {"learning_rate": 1e-5}, "learning_rate is 1e-05, but the run of .* has 0.0003"),
    ],
    ids=str,
)
def test_what_would_make_another_run_of_it_is_refused_on_resume(stopped, fields, settings, message):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        pretrain(CONFIG.replace(**fields), phantom(), stopped, dataclasses.replace(SETTINGS, **settings), resume="auto")
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_a_run_from_before_a_field_goes_on_and_may_recompute(stopped, finished, tmp_path):
    out, _ = finished
    checkpoint = read_checkpoint(stopped / "checkpoints" / "last.ckpt", mmap=False)
    del checkpoint["run"]["model"]["decode_fraction"], checkpoint["run"]["model"]["activation_checkpointing"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    config = CONFIG.replace(activation_checkpointing=True)
    pretrain(config, phantom(), tmp_path / "run", SETTINGS, resume=tmp_path / "old.ckpt")
    undisturbed = losses(out)
    assert losses(tmp_path / "run") == pytest.approx({step: undisturbed[step] for step in (6, 7, 8)}, rel=1e-4)


def test_other_statistics_are_refused_on_resume(stopped):
    others = Normalization({**phantom().normalization.percentiles, "ir": ((0.0, 1.0, 2.0),)})
    subjects = type("Rescaled", (StopsAfter,), {"normalization": others})(5, 32, 12)
    with pytest.raises(ValueError, match="statistics of the subjects are not those of the run"):
        pretrain(CONFIG, subjects, stopped, SETTINGS, resume="auto")


@pytest.mark.parametrize("settings", [SETTINGS, dataclasses.replace(SETTINGS, ema=0.5)], ids=["plain", "averaged"])
def test_a_run_that_ended_before_it_wrote_its_model_writes_it_when_it_is_resumed(tmp_path, settings):
    model = pretrain(CONFIG, phantom(), tmp_path, settings)
    shutil.rmtree(tmp_path / "model"), shutil.rmtree(tmp_path / "encoder")
    again = pretrain(CONFIG, phantom(), tmp_path, settings, resume="auto")
    assert not (tmp_path / "logs" / "version_1").exists()
    for read in (again, mmmae.FastModel.from_pretrained(tmp_path / "model")):
        for name, parameter in read.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name)), name


def test_other_subjects_are_refused_on_resume(stopped):
    with pytest.raises(ValueError, match="the subjects are not those of the run of"):
        pretrain(CONFIG, StopsAfter(6, 32, 12), stopped, SETTINGS, resume="auto")


def test_the_last_checkpoint_is_of_the_last_step_whatever_the_interval(tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=4)
    pretrain(CONFIG, phantom(), tmp_path, settings)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 4


def test_a_folder_with_another_run_is_not_resumed_into(finished, stopped, tmp_path):
    out, _ = finished
    with pytest.raises(ValueError, match="holds a run already"):
        pretrain(CONFIG, phantom(), out, SETTINGS, resume=stopped / "checkpoints" / "last.ckpt")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run already"):
        pretrain(CONFIG, phantom(), tmp_path, SETTINGS)


def test_a_run_goes_on_in_a_folder_of_its_own(finished, stopped, tmp_path):
    out, _ = finished
    pretrain(CONFIG, phantom(), tmp_path / "new", SETTINGS, resume=stopped / "checkpoints" / "last.ckpt")
    undisturbed = losses(out)
    assert losses(tmp_path / "new") == {step: undisturbed[step] for step in (6, 7, 8)}


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_subjects(tmp_path):
    settings = dataclasses.replace(SETTINGS, learning_rate=1e30, clip=1e30, warmup=0)
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) in step \d, of phantom-\S+, phantom-\S+; "):
        pretrain(CONFIG, phantom(), tmp_path, settings)
    assert not (tmp_path / "encoder").exists()


def test_an_interrupted_run_raises_keyboard_interrupt_and_can_be_resumed(finished, tmp_path):
    class Interrupted(StopsAfter):
        def __getitem__(self, index):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return Phantom.__getitem__(self, index)

    subjects = Interrupted(5, 32, 12)
    subjects.left = 2 * 4 + 1
    with pytest.raises(KeyboardInterrupt):
        pretrain(CONFIG, subjects, tmp_path, SETTINGS)
    assert not (tmp_path / "encoder").exists()
    pretrain(CONFIG, phantom(), tmp_path, SETTINGS, resume="auto")
    undisturbed = losses(finished[0])
    assert losses(tmp_path, 1) == {step: undisturbed[step] for step in range(3, 9)}


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="device is 'quantum', which can't be used"):
        pretrain(CONFIG, phantom(), tmp_path / "run", dataclasses.replace(SETTINGS, device="quantum"))
    assert not (tmp_path / "run").exists()


def test_biases_norms_and_positions_do_not_decay():
    module = Pretraining(mmmae.fast_model(CONFIG), SETTINGS, {})
    decaying, others = module.configure_optimizers()["optimizer"].param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    decaying, others = ({names[id(parameter)] for parameter in group["params"]} for group in (decaying, others))
    assert {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "decoder_pred.weight"} <= decaying
    plain = {"blocks.0.attn.qkv.bias", "blocks.0.norm1.weight", "pos_embed_spatial", "mask_token"}
    assert plain | {"decoder_pos_embed_spectral", "aux_encoders.ir.pos_embed"} <= others
    assert len(decaying) + len(others) == len(names)


def test_the_optimizer_is_that_of_mae():
    optimizer = Pretraining(mmmae.fast_model(CONFIG), SETTINGS, {}).configure_optimizers()["optimizer"]
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(group["betas"] == (0.9, 0.95) and group["fused"] for group in optimizer.param_groups)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_gradients_are_clipped_to_the_norm_asked_for(tmp_path, monkeypatch, clip):
    norms = []
    step = torch.optim.AdamW.step

    def watched(self, closure=None):
        loss = step(self, closure)
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return loss

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    pretrain(CONFIG, phantom(), tmp_path, dataclasses.replace(SETTINGS, steps=3, clip=clip))
    assert len(norms) == 3
    if clip == 1e-3:
        assert norms == pytest.approx([clip] * 3, rel=1e-3)  # the clipping divides by the norm + 1e-6
    else:
        assert min(norms) > 1e-2


def test_the_picture_is_drawn_in_evaluation_mode(tmp_path, monkeypatch):
    modes = []

    def watched(model, *arguments, **options):
        modes.append(model.training)
        return draw(model, *arguments, **options)

    monkeypatch.setattr("mmmae.training.pretrain.draw", watched)
    pretrain(CONFIG, phantom(), tmp_path, dataclasses.replace(SETTINGS, steps=3))
    assert modes == [False]


def test_the_learning_rate_warms_up_and_follows_half_a_cosine(finished):
    out, _ = finished
    rates = list(logged(out, "learning_rate").values())
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * step / 7)) for step in range(7)]
    assert rates == pytest.approx([3e-4 * factor for factor in expected], rel=1e-6)


def test_every_step_has_a_mask_of_its_own_and_counts_valid_pixels_alone(tmp_path, monkeypatch):
    calls = []
    forward = mmmae.FastModel.forward

    def watched(self, hsi, aux=None, present=None, valid=None, *, seed=None):
        if valid is not None:  # the cost report counts a pass without
            calls.append((int(seed), valid.float().mean().item()))
        return forward(self, hsi, aux, present, valid, seed=seed)

    monkeypatch.setattr(mmmae.FastModel, "forward", watched)
    pretrain(CONFIG, phantom(), tmp_path, dataclasses.replace(SETTINGS, steps=3))
    assert len({seed for seed, _ in calls[:3]}) == 3
    assert all(0.3 < share < 1 for _, share in calls)


def test_subjects_that_do_not_fit_the_config_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the subjects have 6 bands, the config has bands = 12"):
        pretrain(CONFIG, StopsAfter(5, 32, 6), tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="modalities"):
        pretrain(CONFIG, StopsAfter(5, 32, 12, aux=("ir",)), tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("steps", 2.5), ("batch", 0), ("learning_rate", 0.0), ("clip", -1.0), ("warmup", 120), ("seed", -1)],
)
def test_a_wrong_setting_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}, expected"):
        PretrainSettings(**{field: value})


def test_every_pass_shows_each_subject_once_and_no_batch_holds_one_twice():
    batches = list(StepSampler(7, 3, 8, seed=1))
    assert len(batches) == 8
    for first in range(0, 8, 2):
        shown = batches[first] + batches[first + 1]
        assert len(set(shown)) == 6
    assert batches[0] != batches[2]


@pytest.mark.parametrize("seeds", [range(24), [seed + 2**30 for seed in range(24)]])
def test_each_seed_has_orders_of_its_own(seeds):
    orders = {tuple(map(tuple, StepSampler(12, 4, 3, seed))) for seed in seeds}
    epochs = {tuple(map(tuple, Order(12, 4, seed, shuffled=True))) for seed in seeds}
    assert len(orders) == len(epochs) == 24


def test_ranks_share_the_batches_of_one_process():
    whole = list(StepSampler(9, 4, 6, seed=1))
    ranks = [list(StepSampler(9, 2, 6, seed=1, rank=rank, ranks=2)) for rank in (0, 1)]
    assert whole == [first + second for first, second in zip(*ranks, strict=True)]


def test_a_sampler_that_starts_late_makes_the_same_steps():
    assert list(StepSampler(7, 3, 8, seed=1, start=3)) == list(StepSampler(7, 3, 8, seed=1))[3:]
