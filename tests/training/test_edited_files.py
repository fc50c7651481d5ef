"""Edited files of runs and models: one line that names the file and the key, and no allocation."""

import copy
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmmae
from mmmae.phantom import Phantom
from mmmae.training.checkpoints import describe
from mmmae.training.pretrain import check_memory, pretrain
from mmmae.training.settings import PretrainSettings

pytestmark = pytest.mark.xdist_group("edited_files")  # whose run is made once
CONFIG = mmmae.MMMAEConfig.preset("tiny", image_size=32, patch=(3, 8, 8), target="pixels")
SETTINGS = PretrainSettings(steps=4, batch=2, warmup=0)
WEIGHT = "model.blocks.0.attn.qkv.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, and the content of its checkpoint as if it were to make four."""
    out = tmp_path_factory.mktemp("edited")
    pretrain(CONFIG, Phantom(4, image_size=32), out, dataclasses.replace(SETTINGS, steps=2))
    content = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    content["run"] |= {"finished": False, "settings": content["run"]["settings"] | {"steps": 4}}
    return out, content


def first_state(content):
    return content["optimizer_states"][0]["state"][0]


def far_too_large():
    """Return a tensor of 4 TB in a file of a few bytes."""
    return torch.zeros(1).expand(10**12)


CHECKPOINTS = {
    "a part missing": (lambda c: c.pop("loops"), "no checkpoint of a pretraining run"),
    "text as step": (lambda c: c.update(global_step="3"), "global_step is '3', expected"),
    "a negative step": (lambda c: c.update(global_step=-1), "global_step is -1, expected a whole number >= 0"),
    "no settings": (lambda c: c["run"].pop("settings"), "run: settings is None, expected a dict"),
    "an unknown setting": (lambda c: c["run"]["settings"].update(speed=9), "speed"),
    "a wrong setting": (lambda c: c["run"]["settings"].update(steps=-4), "steps is -4"),
    "a wrong config": (lambda c: c["run"]["model"].update(depth=10**9), "depth is 1000000000, expected at most 10000"),
    "ranks as text": (lambda c: c["run"].update(ranks="two"), "run: ranks is 'two'"),
    "weights as list": (lambda c: c.update(state_dict=[1, 2]), "state_dict is a list, expected a dict"),
    "a number as weight": (lambda c: c["state_dict"].update({WEIGHT: 3}), f"{WEIGHT} is 3, expected a Tensor"),
    "a weight missing": (lambda c: c["state_dict"].pop(WEIGHT), "missing: blocks.0.attn.qkv.weight"),
    "an unknown weight": (lambda c: c["state_dict"].update({"model.x": torch.ones(1)}), "unknown: x"),
    "a weight of another shape": (
        lambda c: c["state_dict"].update({WEIGHT: torch.ones(3, 2)}),
        r"blocks.0.attn.qkv.weight has shape \[3, 2\]",
    ),
    "a weight of 4 TB": (lambda c: c["state_dict"].update({WEIGHT: far_too_large()}), "has shape .1000000000000.,"),
    "whole numbers as weight": (
        lambda c: c["state_dict"].update({WEIGHT: c["state_dict"][WEIGHT].long()}),
        "has the type torch.int64, expected one of torch.float32",
    ),
    "NaN in a weight": (
        lambda c: c["state_dict"].update({WEIGHT: c["state_dict"][WEIGHT] * torch.nan}),
        "blocks.0.attn.qkv.weight has values that are not finite",
    ),
    "NaN in the optimizer": (
        lambda c: first_state(c)["exp_avg"].fill_(torch.nan),
        r"\['exp_avg'\] has values that are",
    ),
    "another shape in the optimizer": (
        lambda c: first_state(c).update(exp_avg=far_too_large()),
        r"optimizer_states\[0\]\['state'\]\[0\]\['exp_avg'\] has shape",
    ),
    "a state missing": (lambda c: c["optimizer_states"].clear(), "optimizer_states holds 0 parts, expected one"),
    "loops of another kind": (lambda c: c["loops"].update(fit_loop=3), "the run can't go on from it"),
    "a schedule without its fields": (lambda c: c["lr_schedulers"].__setitem__(0, 7), "the run can't go on from it"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_an_edited_checkpoint_is_refused_and_the_key_is_named(run, tmp_path, kind):
    edit, message = CHECKPOINTS[kind]
    content = copy.deepcopy(run[1])
    edit(content)
    path = tmp_path / "edited.ckpt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=f"edited.ckpt: .*{message}") as caught:
        pretrain(CONFIG, Phantom(4, image_size=32), tmp_path / "run", SETTINGS, resume=path)
    assert len(str(caught.value)) < 500


NAME = "blocks.0.attn.qkv.weight"
MODELS = {
    "a weight missing": (lambda c, w: w.pop(NAME), f"model.safetensors: .*missing: {NAME}"),
    "many weights missing": (
        lambda c, w: c.update(depth=5),
        r"model.safetensors: .*missing: blocks.2.norm1.weight, blocks.3.* and \d+ others",
    ),
    "an unknown weight": (lambda c, w: w.update(x=torch.ones(1)), "model.safetensors: .*unknown: x"),
    "another shape": (lambda c, w: w.update({NAME: torch.ones(2)}), rf"model.safetensors: .*{NAME} has shape \[2\]"),
    "whole numbers": (lambda c, w: w.update({NAME: w[NAME].int()}), f"model.safetensors: .*{NAME} has the type"),
    "NaN": (lambda c, w: w.update({NAME: w[NAME] * torch.nan}), f"model.safetensors: .*{NAME} has values that"),
    "a number of 31 digits": (
        lambda c, w: c.update(dim=10**30),
        "config.json: config: dim is 10{30}, expected at most",
    ),
    "a thousand million blocks": (lambda c, w: c.update(depth=10**9), "config.json: config: depth is 10{9}, expected"),
    "text as number": (lambda c, w: c.update(heads="two"), "config.json: config: heads is 'two'"),
    "an unknown field": (lambda c, w: c.update(colour=3), "config.json: config: unknown field 'colour'"),
    "a list as images": (lambda c, w: c.update(aux=[1]), r"config.json: config: aux is \[1\], expected a mapping"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_an_edited_model_is_refused_and_file_and_key_are_named(run, tmp_path, kind):
    edit, message = MODELS[kind]
    config, weights = (
        json.loads((run[0] / "model" / "config.json").read_text()),
        load_file(run[0] / "model" / "model.safetensors"),
    )
    edit(config, weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        mmmae.FastModel.from_pretrained(tmp_path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"depth": ' + "[" * 100_000, "\ufeff{}", "no JSON", "[]", ""], ids=range(6)
)
def test_a_config_that_is_no_json_object_is_refused(run, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"config\.json: config: "):
        mmmae.FastModel.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_into_memory_are_refused_before_they_are_made():
    with pytest.raises(ValueError, match=r"the weights of the model take .* GB, this machine has .* GB of memory"):
        check_memory(CONFIG.replace(dim=2**16, depth=2, mlp_ratio=1.0))


def test_names_of_files_that_are_not_utf8_are_told_apart():
    first, second = (describe(CONFIG, SETTINGS, 1, [name])["names"] for name in ("\udcff", "\udcfe"))
    assert first != second
