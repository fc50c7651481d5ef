"""Options of a pretraining run: precision, accumulation, averages, validation, augmentation, reports."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

import mmmae
from mmmae.data import PairedFolder, collate
from mmmae.phantom import write_phantom
from mmmae.training.checkpoints import WholeCheckpoints, read_checkpoint
from mmmae.training.pretrain import pretrain
from mmmae.training.reports import measure_contrast, measure_features
from mmmae.training.sampling import SubjectData, Visits, hold_out
from mmmae.training.settings import PretrainSettings
from tests.training.test_pretrain import CONFIG, StopsAfter, logged, losses, phantom

SETTINGS = PretrainSettings(steps=6, batch=2, warmup=1, checkpoint_every=2, report_every=3)
with_settings = functools.partial(dataclasses.replace, SETTINGS)


@pytest.mark.parametrize(
    "settings",
    [
        with_settings(accumulate=2, flip=True, crop=0.5),
        with_settings(ema=0.9, validation=2),
        with_settings(precision="16"),
    ],
    ids=["accumulated and augmented", "averaged and validated", "scaled"],
)
def test_a_resumed_run_has_the_losses_of_an_undisturbed_one(tmp_path, settings):
    undisturbed = pretrain(CONFIG, phantom(), tmp_path / "whole", settings)
    subjects = phantom()
    # In the sixth step, a step behind the last checkpoint; validations read too.
    subjects.left = settings.batch * (5 * settings.accumulate + (2 if settings.validation else 0)) + 1
    with pytest.raises(RuntimeError, match="power cut"):
        pretrain(CONFIG, subjects, tmp_path / "cut", settings)
    assert read_checkpoint(tmp_path / "cut" / "checkpoints" / "last.ckpt")["global_step"] == 4
    resumed = pretrain(CONFIG, phantom(), tmp_path / "cut", settings, resume="auto")
    for name in ("loss", *["validation_loss"] * (settings.validation > 0)):
        again, first = logged(tmp_path / "cut", name, 1), logged(tmp_path / "whole", name)
        assert again
        assert again == {step: first[step] for step in again}
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, undisturbed.get_parameter(name)), name


def test_a_run_that_was_stopped_twice_in_the_midst_of_a_step_has_the_same_losses(tmp_path):
    settings = with_settings(accumulate=2)
    pretrain(CONFIG, phantom(), tmp_path / "whole", settings)
    for passes, resume in ((9, None), (1, "auto")):  # in the fifth step's first and second forward pass
        subjects = phantom()
        subjects.left = 2 * passes
        with pytest.raises(RuntimeError, match="power cut"):
            pretrain(CONFIG, subjects, tmp_path / "cut", settings, resume=resume)
    pretrain(CONFIG, phantom(), tmp_path / "cut", settings, resume="auto")
    assert losses(tmp_path / "cut", 2) == {step: losses(tmp_path / "whole")[step] for step in (4, 5)}


def test_half_precision_has_the_losses_of_full_within_its_rounding(tmp_path):
    first = {}
    for precision in ("32", "bf16", "16"):
        pretrain(CONFIG, phantom(), tmp_path / precision, with_settings(steps=2, precision=precision))
        first[precision] = losses(tmp_path / precision)[0]
    # A sum over thousands of pixels averages rounding errors of single ones, at most 2^-9 and 2^-12 each.
    assert first["bf16"] == pytest.approx(first["32"], rel=2**-7)
    assert first["16"] == pytest.approx(first["32"], rel=2**-10)
    assert first["bf16"] != first["32"]


def test_accumulated_batches_are_those_of_more_steps(tmp_path):
    pretrain(CONFIG, phantom(), tmp_path, with_settings(steps=3, accumulate=2))
    assert sorted(losses(tmp_path)) == [0, 1, 2]

    def visits(settings):
        data = SubjectData(phantom(), settings, 1)
        data.trainer = type("Alone", (), {"global_rank": 0, "world_size": 1})()
        return list(data.train_dataloader().batch_sampler)

    assert visits(with_settings(steps=3, accumulate=2)) == visits(with_settings(steps=6))


def test_the_average_of_the_weights_is_what_is_saved_in_the_end(tmp_path, monkeypatch):
    weights = []
    save = WholeCheckpoints.save_checkpoint

    def watched(self, checkpoint, path, storage_options=None):
        weights.append({name: value.clone() for name, value in checkpoint["current_model_state"].items()})
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", watched)
    model = pretrain(CONFIG, phantom(), tmp_path, with_settings(steps=3, ema=0.75, checkpoint_every=1))
    encoder = mmmae.HSIEncoder.from_pretrained(tmp_path / "encoder")
    name = "blocks.0.attn.qkv.weight"
    first, second, third = (step[f"model.{name}"] for step in weights[:3])
    average = 0.75 * (0.75 * first + 0.25 * second) + 0.25 * third
    torch.testing.assert_close(model.get_parameter(name), average)
    assert torch.equal(encoder.get_parameter(name), model.get_parameter(name))


def test_held_out_subjects_are_measured_and_never_trained_on(tmp_path):
    shown = []

    class Watched(StopsAfter):
        def __getitem__(self, index):
            shown.append(index)
            return super().__getitem__(index)

    training, held_out = hold_out(5, 2, seed=0)
    assert sorted(training + held_out) == list(range(5))
    pretrain(CONFIG, Watched(5, 32, 12), tmp_path, with_settings(validation=2))
    assert sorted(logged(tmp_path, "validation_loss")) == [1, 3, 5]
    # Steps 1 and 2, a validation, and so on; at the end the picture of the first subject.
    assert [set(shown[4:6]), set(shown[10:12]), set(shown[16:18])] == [set(held_out)] * 3
    assert set(shown[:4] + shown[6:10] + shown[12:16]) <= set(training)


def test_a_run_that_gets_no_better_ends(tmp_path):
    settings = with_settings(steps=40, validation=2, patience=2, learning_rate=1e-30)
    pretrain(CONFIG, phantom(), tmp_path, settings)
    assert sorted(logged(tmp_path, "validation_loss")) == [1, 3, 5]  # the first is the best, and two are no better
    assert (tmp_path / "encoder").exists()


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: torch.tensor(math.inf))
    with pytest.raises(
        ValueError, match=r"the norm of the gradient is inf in step 1, of phantom-\S+, phantom-\S+, though"
    ):
        pretrain(CONFIG, phantom(), tmp_path, SETTINGS)


def test_a_loss_that_is_not_finite_names_the_layer(tmp_path):
    settings = with_settings(learning_rate=1e30, clip=1e30, warmup=0)
    named = (
        r"of phantom-\S+, phantom-\S+; the largest activation is \S+, in \S+, and the first that is not finite is in "
    )
    with pytest.raises(ValueError, match=named):
        pretrain(CONFIG, phantom(), tmp_path, settings)


def test_a_loss_that_is_not_finite_names_the_files(tmp_path):
    write_phantom(tmp_path / "eyes", subjects=2, image_size=32)
    subjects = PairedFolder(tmp_path / "eyes" / "hsi", {"ir": tmp_path / "eyes" / "ir"}, image_size=32)
    config, settings = CONFIG.replace(aux={"ir": 1}), with_settings(learning_rate=1e30, clip=1e30, warmup=0)
    with pytest.raises(ValueError, match=r"in step \d, of \S+ \(\S+/hsi/\S+\.npz"):
        pretrain(config, subjects, tmp_path / "run", settings)


def test_a_broken_run_keeps_its_last_good_checkpoint(tmp_path, monkeypatch):
    forward = mmmae.FastModel.forward

    def broken(self, hsi, aux=None, present=None, valid=None, *, seed=None):
        output = forward(self, hsi, aux, present, valid, seed=seed)
        return output._replace(loss=output.loss * math.nan) if seed == 4 else output

    monkeypatch.setattr(mmmae.FastModel, "forward", broken)
    with pytest.raises(ValueError, match="the loss is nan in step 5"):
        pretrain(CONFIG, phantom(), tmp_path, SETTINGS)
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 4
    assert all(torch.isfinite(weight).all() for weight in checkpoint["state_dict"].values())


@pytest.mark.usefixtures("whole_runs")
def test_a_run_reports_features_contrast_speed_and_pictures(tmp_path):
    pretrain(CONFIG, phantom(), tmp_path, with_settings(pictures_every=4))
    assert sorted(logged(tmp_path, "feature_rank")) == [0, 3]
    assert all(1 <= rank <= CONFIG.dim for rank in logged(tmp_path, "feature_rank").values())
    accuracies, shares = logged(tmp_path, "contrastive_accuracy_ir"), logged(tmp_path, "share_of_products")
    assert accuracies
    assert all(0 <= share <= 1 for share in accuracies.values())
    assert sorted(shares) == list(range(6))
    assert all(0 < share < 1 for share in shares.values())
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["step-0000004.png"]
    assert list((tmp_path / "logs" / "version_0").glob("events.out.tfevents.*"))


def test_collapsed_features_have_rank_one_and_no_deviation():
    one = torch.randn(1, 1, 16).expand(4, 9, 16)
    assert measure_features(one) == {"feature_rank": pytest.approx(1, rel=1e-5), "feature_std": 0.0}
    axes = torch.eye(16).expand(4, 16, 16)  # 16 orthogonal tokens of one length, in the 15 dimensions off their mean
    assert measure_features(axes)["feature_rank"] == pytest.approx(15, rel=1e-4)
    assert measure_features(torch.randn(64, 1, 16))["feature_std"] == pytest.approx(1, abs=0.1)


def test_the_contrast_of_a_batch_is_that_of_the_loss():
    model = mmmae.fast_model(CONFIG.replace(conditioning_dropout=0.0)).eval()
    subjects = phantom()
    batch = collate([subjects[index] for index in range(5)], list(CONFIG.aux))
    with torch.no_grad():
        output = model(batch.hsi, batch.aux, batch.present, seed=1)
    figures = measure_contrast(model, batch, output.latent)
    names = [name for name in CONFIG.aux if f"contrastive_{name}" in figures]
    assert names == list(CONFIG.aux)
    mean = np.mean([figures[f"contrastive_{name}"] for name in names])
    assert mean == pytest.approx(output.loss_contrastive.item(), rel=1e-5)


def test_a_visit_is_cropped_and_flipped_by_its_number_alone():
    data = Visits(phantom(), range(5), with_settings(flip=True, crop=0.3), augmented=True)
    first, again, later = data[2], data[2], data[7]
    assert first.name == later.name
    assert torch.equal(first.hsi, again.hsi)
    assert not torch.equal(first.hsi, later.hsi)
    plain = Visits(phantom(), range(5), with_settings(flip=True, crop=0.3), augmented=False)
    assert torch.equal(plain[7].hsi, phantom()[2].hsi)


def test_each_image_may_be_missing_and_features_do_not_depend_on_batch_mates(tmp_path):
    subjects = StopsAfter(16, 32, 12, missing=0.3)
    model = pretrain(CONFIG, subjects, tmp_path, with_settings(batch=4))
    counts = {name: sum(name in subjects[index].aux for index in range(16)) for name in CONFIG.aux}
    assert all(0 < count < 16 for count in counts.values()), counts
    encoder = mmmae.HSIEncoder.from_pretrained(tmp_path / "encoder").eval()
    whole = collate([subjects[index] for index in range(16)], list(CONFIG.aux))
    with torch.no_grad():
        features = encoder(whole.hsi)
        latent = model(whole.hsi, whole.aux, whole.present, mask=None, seed=5)
        for index in range(16):
            alone = collate([subjects[index]], list(CONFIG.aux))
            mask = type(latent.mask)(*(ids[index : index + 1] for ids in latent.mask))
            single = model(alone.hsi, alone.aux, alone.present, mask=mask)
            # The same sums in another order where a product is cut elsewhere: float32's rounding.
            torch.testing.assert_close(encoder(alone.hsi)[0], features[index], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(single.latent[0], latent.latent[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "8"}, "precision is '8', must be one of auto, 32, bf16, 16"),
        ({"strategy": "zero"}, "strategy is 'zero', must be one of ddp, fsdp"),
        ({"strategy": "fsdp", "ema": 0.9}, "ema is 0.9, which averages whole weights"),
        ({"strategy": "fsdp", "precision": "16"}, "with 'fsdp' it must be 'bf16'"),
        ({"patience": 1}, "patience is 1, which needs held-out subjects"),
        ({"crop": 0.0}, r"crop is 0.0, expected a number in \(0, 1\]"),
        ({"ema": 1.0}, r"ema is 1.0, expected a number in \[0, 1\)"),
        ({"accumulate": 0}, "accumulate is 0, expected a whole number >= 1"),
        ({"log_every": 0}, "log_every is 0, expected a whole number >= 1"),
        ({"compile": "fast"}, "compile is 'fast', must be one of False, True, default, reduce-overhead, "),
        ({"cuda_graph": "yes"}, "cuda_graph is 'yes', must be one of auto, on, off"),
        ({"cuda_graph": "on", "precision": "16"}, "cuda_graph is 'on', but precision is '16', whose loss scaler"),
        ({"cuda_graph": "on", "compile": "max-autotune"}, "cuda_graph is 'on', but compile is 'max-autotune', which"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        with_settings(**fields)


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        (5, "validation is 5, expected less than the number of subjects, 5"),
        (3, "validation is 3, expected a multiple of 2, the samples of a forward pass on all processes"),
        (4, "batch is 2, expected at most the number of subjects, 1"),
    ],
)
def test_held_out_subjects_that_do_not_fit_are_refused(tmp_path, validation, message):
    with pytest.raises(ValueError, match=message):
        pretrain(CONFIG, phantom(), tmp_path / "run", with_settings(validation=validation))
    assert not (tmp_path / "run").exists()
