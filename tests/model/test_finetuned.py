"""What the folder of a fine-tuned model says about it."""

import json

import pytest

import mmmae
from mmmae.model.finetuned import build, is_finetuned, load_finetuned, read_finetuned, save_finetuned

CONFIG = mmmae.MMMAEConfig.preset("tiny", image_size=32, patch=(3, 8, 8), aux={})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuned")
    model = build("segmentation", mmmae.HSIEncoder(CONFIG), 3)
    save_finetuned(folder, model, ["soil", "wheat", "water"], numbers=[1, 2, 17], window=24)
    return folder


def test_numbers_of_classes_and_the_window_are_kept(folder):
    found = read_finetuned(folder)
    assert (found.task, found.classes, found.window) == ("segmentation", ["soil", "wheat", "water"], 24)
    assert found.values == [1, 2, 17]
    assert is_finetuned(folder)
    assert not is_finetuned(folder / "none")


@pytest.mark.parametrize(
    ("classes", "values"),
    [(["3", "10"], [3, 10]), (["3", "wheat"], [0, 1]), (["1000000", "2"], [0, 1])],
    ids=["numbers", "names", "numbers too large"],
)
def test_a_model_without_numbers_has_its_names_or_places_for_values(tmp_path, folder, classes, values):
    content = json.loads((folder / "config.json").read_text())
    content.update(classes=classes, numbers=None)
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert read_finetuned(tmp_path).values == values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numbers": [1, 2]}, "config.json: numbers is .*, expected a whole number >= 0 for each class"),
        ({"numbers": [1, 2, "3"]}, "numbers is"),
        ({"numbers": [1, 2, -3]}, "numbers is"),
        ({"window": 0}, "window is 0, expected a whole number of pixels"),
        ({"window": 10**30}, "window is 10"),
        ({"window": "24"}, "window is 24"),
        ({"whole": 1}, "whole is 1, expected true or false"),
        ({"classes": "abc"}, "not the config of a fine-tuned model"),
    ],
    ids=str,
)
def test_a_wrong_value_is_named(tmp_path, folder, changes, message):
    content = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **changes}))
    with pytest.raises(ValueError, match=message):
        read_finetuned(tmp_path)


def test_the_folder_of_a_run_leads_to_its_model(folder, tmp_path):
    (tmp_path / "model").symlink_to(folder)
    (tmp_path / "config.json").write_text(json.dumps({"task": "segmentation", "classes": ["a"], "encoder": {}}))
    expected = f"expected the folder of the model itself, {tmp_path / 'model'}"
    with pytest.raises(ValueError, match=expected):
        read_finetuned(tmp_path)
    with pytest.raises(FileNotFoundError, match=expected):
        load_finetuned(tmp_path)
