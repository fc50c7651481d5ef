"""Fine-tuning runs write their results and learn; learning rates follow the depth, wrong input is refused."""

import csv
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mmmae
from mmmae.cli import main
from mmmae.data import PairedFolder, Sample, Subjects
from mmmae.model.finetuned import build, load_finetuned
from mmmae.phantom import write_phantom
from mmmae.training.finetuning.finetune import finetune
from mmmae.training.finetuning.labelled import Item, Labelled, Order
from mmmae.training.finetuning.labels import UNLABELLED, Labels, read_class_labels, read_mask_labels
from mmmae.training.finetuning.maps import class_colours
from mmmae.training.finetuning.module import Finetuning, class_weights, parameter_groups
from mmmae.training.finetuning.scores import Scores
from mmmae.training.finetuning.settings import FinetuneSettings
from tests.emulator.device_waits import DeviceWaits
from tests.model.test_device_waits import meta  # noqa: F401

CONFIG = mmmae.MMMAEConfig.preset("tiny", image_size=32, patch=(3, 8, 8), aux={})
SETTINGS = FinetuneSettings(epochs=2, batch=3)
SMALL = ["--scratch", "--preset", "tiny", "--set", "image_size=32", "--set", "patch=[3,8,8]", "--epochs", "1"]


def encoder(seed=0):
    torch.manual_seed(seed)
    return mmmae.HSIEncoder(CONFIG)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "phantom"
    write_phantom(folder, 6, 32)
    return folder


class Squares(Subjects):
    """Subjects of noise with a brighter square somewhere; the square is class 1, and pixels above row 2 are nodata."""

    bands = 12

    def __init__(self, count=8):
        self.names = [f"square{number}" for number in range(count)]

    def mask(self, index):
        row, column = np.random.default_rng(index).integers(0, 24, 2)
        mask = torch.zeros(32, 32, dtype=torch.int64)
        mask[row : row + 8, column : column + 8] = 1
        return mask

    def __getitem__(self, index):
        noise = torch.randn(12, 32, 32, generator=torch.Generator().manual_seed(index)) / 4
        valid = torch.ones(32, 32, dtype=torch.bool)
        valid[:2] = False
        return Sample(self.names[index], (noise + 2 * self.mask(index)).masked_fill(~valid, 0.0)[None], {}, valid)

    def labels(self):
        counts = {index: torch.bincount(self.mask(index).flatten()) for index in range(len(self))}
        return Labels("segmentation", ["ground", "square"], counts, self.mask)


@pytest.fixture(scope="module")
def segmented(files, tmp_path_factory):
    """The folder of a run of the command line."""
    out = tmp_path_factory.mktemp("runs") / "segmentation"
    options = ["--hsi", str(files / "hsi"), "--task", "segmentation", "--labels", str(files / "labels")]
    names = ["--classes", "background,vessel,disc", "--validation", "phantom-0-00001,phantom-0-00004"]
    assert main(["finetune", *SMALL, *options, *names, "--augment", "--out", str(out)]) == 0
    return out


def test_a_segmentation_run_leaves_all_it_promises(segmented):
    for name in ("config.json", "normalization.json", "metrics.json", "confusion.png", "confusion.csv"):
        assert (segmented / name).stat().st_size > 0, name
    assert sorted(path.name for path in (segmented / "maps").iterdir()) == [
        "phantom-0-00001.png",
        "phantom-0-00004.png",
    ]
    assert not [path for path in segmented.rglob("*") if path.name.endswith(".partial")]
    report = json.loads((segmented / "metrics.json").read_text())
    assert report["validation"] == ["phantom-0-00001", "phantom-0-00004"]
    assert len(report["training"]) == 4
    assert {"accuracy", "f1_macro", "miou"} < set(report)
    assert set(report["classes"]) == {"background", "vessel", "disc"}


def test_the_kept_model_scores_what_the_report_says(segmented, files):
    report = json.loads((segmented / "metrics.json").read_text())
    model, classes = load_finetuned(segmented / "model")
    subjects = PairedFolder(files / "hsi", image_size=32, normalization=segmented / "model" / "normalization.json")
    scores = Scores("segmentation", classes)
    for name in report["validation"]:
        sample = subjects[subjects.names.index(name)]
        mask = torch.from_numpy(np.load(files / "labels" / f"{name}.npy")).long()
        target = mask.masked_fill((mask == 255) | ~sample.valid, UNLABELLED)
        with torch.no_grad():
            scores.update(model(sample.hsi[None]), target[None])
    assert scores.compute()["confusion"] == report["confusion"]
    with (segmented / "confusion.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header[1:] == classes
    assert [[int(value) for value in row[1:]] for row in rows] == report["confusion"]


def test_a_classification_run_leaves_a_model_of_words(files, tmp_path):
    subjects = PairedFolder(files / "hsi", image_size=32)
    labels = read_class_labels(files / "classes.csv", subjects)
    model, report = finetune(encoder(), subjects, labels, tmp_path, SETTINGS, validation=0.3)
    assert isinstance(model, mmmae.LinearClassifier)
    assert load_finetuned(tmp_path / "model")[1] == labels.classes == ["left", "right"]
    assert sum(map(sum, report["confusion"])) == len(report["validation"]) == 2
    assert not (tmp_path / "maps").exists()


def test_a_segmentation_learns_what_can_be_seen(tmp_path):
    squares = Squares()
    settings = FinetuneSettings(epochs=12, batch=2, learning_rate=5e-3, class_weights="balanced", augment=True)
    _, report = finetune(encoder(), squares, squares.labels(), tmp_path, settings, maps=0)
    assert report["miou"] > 0.9  # noise of 1/4 about 0 and 2, in twelve bands: each pixel alone tells its class


def test_the_best_epoch_is_kept_and_the_last_one_on_request(tmp_path, monkeypatch):
    squares, scores = Squares(4), iter([0.3, 0.6, 0.5])
    real = Scores.compute
    monkeypatch.setattr(Scores, "compute", lambda self: {**real(self), "miou": next(scores)})
    _, report = finetune(encoder(), squares, squares.labels(), tmp_path / "best", FinetuneSettings(epochs=3), maps=0)
    assert (report["epoch"], report["miou"]) == (2, 0.6)
    scores = iter([0.1])  # scored once
    settings = FinetuneSettings(epochs=3, keep="last")
    _, report = finetune(encoder(), squares, squares.labels(), tmp_path / "last", settings, maps=0)
    assert (report["epoch"], report["miou"]) == (3, 0.1)


def test_a_probe_and_a_head_leave_the_encoder_as_it_was_and_a_full_run_does_not(tmp_path):
    squares, before = Squares(4), encoder()
    for mode in ("probe", "head", "full"):
        settings = FinetuneSettings(epochs=1, mode=mode)
        model, _ = finetune(encoder(), squares, squares.labels(), tmp_path / mode, settings, maps=0)
        same = [torch.equal(new, old) for new, old in zip(model.encoder.parameters(), before.parameters(), strict=True)]
        assert not any(same) if mode == "full" else all(same)


def test_the_same_seed_gives_the_same_model_and_workers_change_nothing(tmp_path):
    squares = Squares(5)
    weights = []
    for number, workers in enumerate((0, 2)):
        settings = FinetuneSettings(epochs=2, batch=2, augment=True, workers=workers)
        model, _ = finetune(encoder(), squares, squares.labels(), tmp_path / str(number), settings, maps=0)
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(*weights)


def test_learning_rates_decay_from_the_head_to_the_patches():
    config = CONFIG.replace(depth=3)
    model = build("classification", mmmae.HSIEncoder(config), 2)
    groups = parameter_groups(model, FinetuneSettings(learning_rate=1.0, layer_decay=0.5))
    of = {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    rates = {name: of[id(parameter)] for name, parameter in model.named_parameters()}
    assert len(of) == len(rates) == len(list(model.parameters()))
    assert rates["head.weight"] == (1.0, 0.05)
    assert rates["head.bias"] == rates["encoder.norm.weight"] == (1.0, 0.0)
    assert rates["encoder.blocks.2.attn.qkv.weight"] == (0.5, 0.05)
    assert rates["encoder.blocks.0.mlp.fc1.weight"] == (0.125, 0.05)
    assert rates["encoder.patch_embed.proj.weight"] == (0.0625, 0.05)
    assert rates["encoder.pos_embed_spatial"] == (0.0625, 0.0)
    probe = parameter_groups(model, FinetuneSettings(mode="probe"))
    assert sum(len(group["params"]) for group in probe) == 2


def test_class_weights_balance_what_the_training_labels_have():
    labels = Labels(
        "segmentation", ["a", "b", "c"], {0: torch.tensor([6, 2, 0]), 1: torch.tensor([0, 0, 9])}, lambda i: i
    )
    assert class_weights(labels, [0], FinetuneSettings()).tolist() == [1, 1, 1]
    balanced = class_weights(labels, [0], FinetuneSettings(class_weights="balanced"))
    assert torch.allclose(balanced[:2], torch.tensor([8 / 18, 8 / 6]))
    assert class_weights(labels, [0, 1], FinetuneSettings(class_weights=(1, 2, 3))).tolist() == [1, 2, 3]


def test_the_loss_is_the_weighted_mean_over_labelled_pixels_and_0_without_any(tmp_path):
    squares = Squares(2)
    model = build("segmentation", encoder(), 2).eval()  # training drops samples at random
    module = Finetuning(model, squares.labels(), [0], tmp_path, FinetuneSettings(class_weights=(1.0, 3.0)))
    hsi, target = squares[0].hsi[None], squares.mask(0)[None].clone()
    target[:, :10] = UNLABELLED
    chosen = target != UNLABELLED
    each = torch.nn.functional.cross_entropy(model(hsi).permute(0, 2, 3, 1)[chosen], target[chosen], reduction="none")
    weights = 1.0 + 2.0 * target[chosen]
    torch.testing.assert_close(module.loss(Item(["x"], hsi, target)), (each * weights).sum() / weights.sum())
    nothing = module.loss(Item(["x"], hsi, torch.full_like(target, UNLABELLED)))
    assert nothing == 0
    nothing.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_flips_take_the_labels_along_and_nodata_has_none():
    squares = Squares(2)
    data = Labelled(squares, squares.labels(), [1], SETTINGS, augmented=True)
    plain = Labelled(squares, squares.labels(), [1], SETTINGS, augmented=False)[0]
    assert (plain.target[:2] == UNLABELLED).all()
    assert (plain.target[2:] == squares.mask(1)[2:]).all()
    seen = set()
    for visit in range(24):
        item = data[visit]
        bright = item.hsi[0].mean(0) > 1  # the square of the volume is where the mask says
        known = item.target != UNLABELLED
        assert torch.equal(bright & known, item.target == 1)
        assert known.sum() == (plain.target != UNLABELLED).sum()
        assert torch.equal(item.hsi, data[visit].hsi)
        seen.add(item.hsi.numpy().tobytes())
    assert len(seen) > 4


def test_each_epoch_visits_each_subject_once_in_an_order_of_its_own():
    order = Order(5, 2, seed=0, shuffled=True)
    epochs = [[*itertools.chain(*order)] for _ in range(3)]
    for number, visits in enumerate(epochs):
        assert sorted(visits) == list(range(5 * number, 5 * number + 5))
    assert len({tuple(visit % 5 for visit in visits) for visits in epochs}) > 1
    assert [*itertools.chain(*Order(5, 2, seed=0, shuffled=False))] == [0, 1, 2, 3, 4]


def test_tiles_are_scored_against_all_labels_of_their_window(tmp_path):
    for folder in ("hsi", "labels"):
        (tmp_path / folder).mkdir()
    for number, name in enumerate(("north", "south")):
        cube = np.random.default_rng(number).normal(size=(12, 64, 64)).astype(np.float32)
        cube[:, :3] = np.nan
        np.savez(tmp_path / "hsi" / f"{name}.npz", cube=cube, nodata=np.nan)
        np.save(tmp_path / "labels" / f"{name}.npy", np.arange(64) % 2 + np.zeros((64, 1)))  # halved, one class is left
    subjects = PairedFolder(tmp_path / "hsi", image_size=32, tile=64)
    labels = read_mask_labels(tmp_path / "labels", subjects)
    settings = FinetuneSettings(epochs=1, batch=1)
    _, report = finetune(encoder(), subjects, labels, tmp_path / "run", settings, validation=["south"], maps=0)
    labelled = [scores["labelled"] for scores in report["classes"].values()]
    assert labelled[0] == labelled[1]
    assert sum(labelled) in (60 * 64, 62 * 64)  # the rows of nodata as far as the resized cube has them


def test_names_of_classes_and_folders_forge_no_lines(tmp_path, files, capsys):
    folder = tmp_path / "a\nheld out: 9"
    folder.mkdir()
    rows = [f'{path.stem},"x\n\x1b[31m{number % 2}"' for number, path in enumerate(sorted((files / "hsi").iterdir()))]
    (tmp_path / "classes.csv").write_text("\n".join(["name,label", *rows]))
    words = [*SMALL, "--hsi", str(files / "hsi"), "--task", "classification", "--labels", str(tmp_path / "classes.csv")]
    assert main(["finetune", *words, "--out", str(folder / "run"), "--validation", "0.3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("held out: ") for line in lines) == 1
    assert any(r"classes: x\n\x1b[31m0, x\n\x1b[31m1" in line for line in lines)


def test_losses_of_epochs_that_are_not_validated_are_logged(tmp_path, capsys):
    squares = Squares(4)
    settings = FinetuneSettings(epochs=3, batch=3, keep="last")
    finetune(encoder(), squares, squares.labels(), tmp_path, settings, validation=["square0"], maps=0)
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["loss"]) for row in rows] == [True] * 3
    assert [bool(row["validation_miou"]) for row in rows] == [False, False, True]
    assert capsys.readouterr().out.count("epoch ") == 3


def test_a_class_that_no_training_subject_has_is_named(tmp_path):
    squares = Squares(3)
    masks = [torch.zeros(32, 32).long(), torch.zeros(32, 32).long(), squares.mask(2)]
    counts = {index: torch.bincount(mask.flatten(), minlength=2) for index, mask in enumerate(masks)}
    labels = Labels("segmentation", ["ground", "square"], counts, masks.__getitem__)
    _, report = finetune(encoder(), squares, labels, tmp_path, SETTINGS, validation=["square2"], maps=0)
    assert report["not_trained"] == ["square"]


@pytest.mark.parametrize("waits", [False, True])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_subjects(tmp_path, monkeypatch, waits):
    monkeypatch.setattr("mmmae.training.finetuning.module.reading_waits", lambda device: waits)
    seen, loss = [], Finetuning.loss

    def broken(self, batch):
        seen.append(batch.name)
        return loss(self, batch) * (math.nan if len(seen) == 5 else 1.0)

    monkeypatch.setattr(Finetuning, "loss", broken)
    squares = Squares(4)
    settings = FinetuneSettings(epochs=3, batch=1, warmup=0.0)
    with pytest.raises(ValueError, match=r"the loss is nan in step 2 of epoch 2, of square\d;") as raised:
        finetune(encoder(), squares, squares.labels(), tmp_path, settings, validation=["square0"], maps=0)
    assert f"of {seen[4][0]};" in str(raised.value)
    assert len(seen) == (6 if waits else 5)  # read behind the epoch's last step, where reading is a wait
    assert all(weight.isfinite().all() for weight in load_finetuned(tmp_path / "model")[0].parameters())


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_only_every_so_many_steps_wait_for_the_device(tmp_path, monkeypatch, task):
    monkeypatch.setattr("mmmae.training.finetuning.module.READ_EVERY", 3)
    squares = Squares(4)
    with torch.device("meta"):
        model = build(task, mmmae.HSIEncoder(CONFIG, "triton", "sdpa"), 2)
    module = Finetuning(model, squares.labels(), [0, 1], tmp_path, SETTINGS).to("meta")
    target = torch.zeros(2, 32, 32) if task == "segmentation" else torch.zeros(2)
    batch = Item(["square0", "square1"], torch.empty(2, 1, 12, 32, 32).to("meta"), target.long().to("meta"))
    with DeviceWaits() as watch:
        for _ in range(2):
            module.training_step(batch, 0).backward()
    assert watch.found == []
    with DeviceWaits() as watch:
        module.training_step(batch, 0)
    assert watch.found != []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subjects": SimpleNamespace(bands=6)}, "the subjects have 6 bands, the encoder takes 12"),
        ({"labels": Labels("segmentation", ["a"], {}, Squares().mask)}, "only the class 'a'"),
        ({"settings": FinetuneSettings(class_weights=(1.0,))}, "class_weights has 1 numbers, expected 2"),
        (
            {
                "settings": FinetuneSettings(mode="head"),
                "labels": Labels("classification", ["a", "b"], {}, Squares().mask),
            },
            "mode is 'head', which classifies pixels by their bands; subjects need full or probe",
        ),
        ({"rgb": (0, 1, 12)}, "expected bands 0..11"),
        ({"validation": ["nobody"]}, "validation names 'nobody'"),
        ({"settings": FinetuneSettings(device="quantum")}, "device is 'quantum', which can't be used"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, change, message):
    squares = Squares(3)
    arguments = {"subjects": squares, "labels": squares.labels(), "settings": SETTINGS, "validation": 0.5, **change}
    with pytest.raises(ValueError, match=message):
        finetune(encoder(), arguments.pop("subjects"), arguments.pop("labels"), tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten(segmented, files):
    squares = Squares(3)
    before = {path: path.read_bytes() for path in segmented.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a run already"):
        finetune(encoder(), squares, squares.labels(), segmented, SETTINGS)
    assert {path: path.read_bytes() for path in segmented.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "half"), ("keep", "all"), ("epochs", 0), ("epochs", 2.5), ("batch", 0), ("workers", -1),
        ("loss", "l2"), ("head_width", 0), ("head_width", 20),
        ("learning_rate", 0.0), ("clip", -1.0), ("layer_decay", 1.5), ("warmup", 1.0), ("weight_decay", -1.0),
        ("seed", -1), ("class_weights", "some"), ("class_weights", (-1.0, 2.0)), ("class_weights", ()),
        ("head_sides", (2,)),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is .*, (expected|must be)"):
        FinetuneSettings(**{field: value})


def test_tiles_are_drawn_as_one_scene(files, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "mmmae.training.finetuning.maps.draw_map",
        lambda name, *arrays: drawn.update({name: arrays}) or SimpleNamespace(savefig=lambda path, **_: path.touch()),
    )
    options = ["--hsi", str(files / "hsi"), "--tile", "16", "--task", "segmentation", "--labels", str(files / "labels")]
    small = [option.replace("image_size=32", "image_size=16") for option in SMALL]
    out = ["--validation", "phantom-0-00003", "--out", str(tmp_path / "run")]
    assert main(["finetune", *small, *options, *out]) == 0
    assert list(drawn) == ["phantom-0-00003"]
    picture, target, predicted, valid, _, bands, *_ = drawn["phantom-0-00003"]
    whole = PairedFolder(files / "hsi", image_size=32, normalization=tmp_path / "run" / "normalization.json")[3]
    torch.testing.assert_close(picture, whole.hsi[0, bands])
    assert torch.equal(valid, whole.valid)
    mask = torch.from_numpy(np.load(files / "labels" / "phantom-0-00003.npy")).long()
    assert torch.equal(target, mask.masked_fill((mask == 255) | ~whole.valid, UNLABELLED))
    assert predicted.shape == (32, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hsi", "{files}/hsi", "--labels", "{files}/none"], "none"),
        (["--labels", "{files}/labels"], "expected --hsi, --cache or --shards"),
        (["--hsi", "{files}/hsi", "--labels", "{files}/labels", "--classes", "a,b"], "there are 2 names of classes"),
        (["--hsi", "{files}/hsi", "--labels", "{files}/labels", "--class-weights", "-1,1"], "class_weights is (-1.0"),
        (["--hsi", "{files}/hsi", "--labels", "{files}/labels", "--aux", "ir={files}/ir"], "--aux is not used"),
        (["--hsi", "{files}/hsi", "--labels", "{files}/labels", "--validation", "nobody"], "names 'nobody'"),
        (["--hsi", "{files}/hsi", "--labels", "{files}/labels", "--rgb", "1,2"], "--rgb has 2 bands"),
        (["--hsi", "{files}/hsi", "--labels", "{files}/labels", "--set", "bands=6"], "--set bands can't be chosen"),
        (["--hsi", "{files}/hsi", "--labels", "{files}/labels", "--epochs", "0"], "epochs is 0"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_status_two_and_writes_nothing(files, tmp_path, capsys, options, message):
    options = [option.replace("{files}", str(files)) for option in options]
    command = ["finetune", *SMALL, "--task", "segmentation", "--out", str(tmp_path / "run"), *options]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmmae finetune: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_read_mask_labels_of_the_phantom_are_the_classes_that_it_draws(files):
    assert read_mask_labels(files / "labels", PairedFolder(files / "hsi")).classes == ["0", "1", "2"]


@pytest.mark.parametrize("classes", [2, 9, 18, 30])
def test_classes_have_colours_of_their_own_and_none_is_that_of_no_label(classes):
    colours = class_colours(classes)
    assert colours.shape == (classes, 3)
    assert len(np.unique(colours, axis=0)) == classes
    assert (np.ptp(colours, axis=1) > 0.05).all()
