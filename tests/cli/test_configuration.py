"""The page of all fields is made from their declarations, and settings come from files, checkpoints and options.

`MMMAE_REWRITE=1 pytest tests/cli/test_configuration.py` writes the page's tables anew.
"""

import csv
import dataclasses
import json
import os
import re
import textwrap
import types
import typing
from pathlib import Path

import pytest
import torch

from mmmae import MMMAEConfig
from mmmae.cli import main
from mmmae.cli.options import config_fields
from mmmae.cli.rules import field_meanings
from mmmae.cli.stored import read_file
from mmmae.config import PRESETS
from mmmae.phantom import Phantom
from mmmae.training.finetuning.settings import FinetuneSettings
from mmmae.training.settings import PretrainSettings

pytestmark = pytest.mark.usefixtures("quick_runs")
PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
TABLE = re.compile(r"(<!-- fields: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
DESCRIBED = {described.__name__: described for described in (MMMAEConfig, PretrainSettings, FinetuneSettings)}
COMMANDS = {"pretrain": PretrainSettings, "finetune": FinetuneSettings}
SMALL = ["--preset", "tiny", "--set", "image_size=32", "--set", "patch=3,8,8", "--steps", "2", "--batch", "1"]


def table(described):
    """Return the table of a dataclass's fields, with type, default, option and meaning."""
    kinds, meanings = typing.get_type_hints(described), field_meanings(described)
    rows = ["| field | type | default | option | meaning |", "| --- | --- | --- | --- | --- |"]
    for field in dataclasses.fields(described):
        option = [f"--set {field.name}=…"] if described is MMMAEConfig else options(field, kinds[field.name])
        default = default_text(getattr(described(), field.name))
        changed = [
            f"{preset}: {default_text(values[field.name])}"
            for preset, values in PRESETS.items()
            if described is MMMAEConfig and field.name in values
        ]
        default = f"{default} ({', '.join(changed)})" if changed else default
        typed = ", ".join(f"`{word}`" for word in option)
        cells = (f"`{field.name}`", kind_text(kinds[field.name]), default, typed, meanings[field.name])
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def options(field, kind):
    """Return the options of a setting."""
    name = field.name.replace("_", "-")
    return [f"--{name}", f"--no-{name}"] if bool in (kind, *typing.get_args(kind)) else [f"--{name}"]


def kind_text(kind):
    """Return what a field takes, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return " or ".join(f"`{choice}`" for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind_text(argument) for argument in arguments)
    if origin is tuple:
        return f"{len(arguments)} {arguments[0].__name__}s" if ... not in arguments else f"{arguments[0].__name__}s"
    if origin is not None:
        return f"{arguments[0].__name__} to {arguments[1].__name__}"
    return "None" if kind is types.NoneType else kind.__name__


def default_text(value):
    """Return a default as an option or a file takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if value is None or isinstance(value, str):
        return str(value)
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def test_the_page_is_made_from_the_fields():
    page = PAGE.read_text()
    fresh = TABLE.sub(lambda match: f"{match[1]}{table(DESCRIBED[match[2]])}{match[4]}", page)
    if os.environ.get("MMMAE_REWRITE"):
        PAGE.write_text(fresh)
        page = fresh
    assert [match[1] for match in TABLE.findall(page)] == list(DESCRIBED)
    assert page == fresh, "MMMAE_REWRITE=1 pytest tests/cli/test_configuration.py writes the page anew"


@pytest.mark.parametrize("described", DESCRIBED.values(), ids=lambda described: described.__name__)
def test_each_field_has_its_own_meaning(described):
    assert list(field_meanings(described))[: len(dataclasses.fields(described))] == [
        field.name for field in dataclasses.fields(described)
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_options_on_the_page_are_those_of_the_command(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    offered = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    (rows,) = [match[2] for match in TABLE.findall(PAGE.read_text()) if DESCRIBED[match[1]] is COMMANDS[command]]
    listed = set(re.findall(r"`(--[a-z-]+)`", rows))
    assert listed <= offered
    assert len(listed) >= len(dataclasses.fields(COMMANDS[command]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Pretrain, and return the run's folder."""
    out = tmp_path_factory.mktemp("run") / "first"
    assert main(["pretrain", *SMALL, "--learning-rate", "1e-5", "--flip", "--compile", "off", "--out", str(out)]) == 0
    return out


def described_run(out):
    """Return what a run's folder says of the run, but for its name."""
    return json.loads((out / "config.json").read_text())


def logged_losses(out):
    """Return the loss of each step of a run, as text."""
    with (out / "logs" / "version_0" / "metrics.csv").open() as file:
        return {row["step"]: row["loss"] for row in csv.DictReader(file) if row["loss"]}


def test_the_config_of_a_run_starts_the_same_run_again(run, tmp_path):
    assert main(["pretrain", "--config", str(run / "config.json"), "--out", str(tmp_path / "again")]) == 0
    assert described_run(tmp_path / "again") == described_run(run)
    first, again = (logged_losses(out) for out in (run, tmp_path / "again"))
    assert len(first) == 2
    assert first == again


def test_options_override_a_file_and_a_file_the_defaults(run, tmp_path):
    (tmp_path / "file.yaml").write_text(
        "model: {image_size: 32, patch: [3, 8, 8], depth: 1, heads: 2, dim: 64, target: embedding}\n"
        "settings: {learning_rate: 1e-3, steps: 2, batch: 1, flip: true, ema: 0.5, precision: 32}\n"
    )
    command = ["pretrain", "--config", str(tmp_path / "file.yaml"), "--no-flip", "--ema", "0", "--set", "depth=2"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    found = described_run(tmp_path / "run")
    assert found["settings"] == dataclasses.asdict(
        PretrainSettings(learning_rate=1e-3, steps=2, batch=1, warmup=0, precision="32")
    )
    expected = {"depth": 2, "dim": 64, "patch": [3, 8, 8], "target": "embedding"}
    assert expected.items() <= found["model"].items()


def test_the_file_on_the_page_is_read(tmp_path):
    (text,) = re.findall(r"(?:^    \w+:\n(?:^      .*\n)+)+", PAGE.read_text(), re.MULTILINE)
    path = tmp_path / "file.yaml"
    path.write_text(textwrap.dedent(text))
    content = read_file(path, {"model", "settings"})
    assert MMMAEConfig.preset("tiny", **content["model"]).patch == (3, 8, 8)
    assert set(content["settings"]) <= {field.name for field in dataclasses.fields(PretrainSettings)}


def test_fine_tuning_runs_from_random_weights_as_a_file_says(tmp_path):
    assert main(["data", "phantom", str(tmp_path / "eyes"), "--subjects", "3", "--size", "32", "--missing", "0"]) == 0
    data = ["--hsi", str(tmp_path / "eyes" / "hsi"), "--labels", str(tmp_path / "eyes" / "labels"), "--scratch"]
    command = ["finetune", *data, "--task", "segmentation", "--validation", "0.4"]
    small = ["--preset", "tiny", "--set", "image_size=32", "--set", "patch=3,8,8", "--epochs", "1"]
    first, again = tmp_path / "first", tmp_path / "again"
    small += ["--head-sides", "1,5"]
    assert main([*command, *small, "--class-weights", "1,2,0.5", "--augment", "--out", str(first)]) == 0
    assert main([*command, "--config", str(first / "config.json"), "--no-augment", "--out", str(again)]) == 0
    found, expected = described_run(again), described_run(first)
    assert expected["settings"].pop("augment") is True
    assert found["settings"].pop("augment") is False
    assert found == expected
    head = json.loads((again / "model" / "config.json").read_text())["head"]
    assert head["sides"] == expected["settings"]["head_sides"] == [1, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("settings: {stepz: 3}", "settings has the unknown field 'stepz', must be one of steps, batch"),
        ("setings: {steps: 3}", "unknown key 'setings', must be one of"),
        ("settings: [3]", "settings is a list, expected a mapping of fields"),
        ("[3]", "expected a mapping with some of"),
        ("a: b: c", "neither JSON nor YAML"),
        ("settings: {steps: 0}", "steps is 0, expected a whole number >= 1"),
        ("model: {colour: 3}", "unknown field 'colour'"),
        (None, "file.yaml: no such file"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "file.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["pretrain", "--config", str(path), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmmae pretrain: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("patch=3,8,8", [3, 8, 8]),
        ("patch=[3,8,8]", [3, 8, 8]),
        ("wavelengths=450.5,600", [450.5, 600]),
        ('aux={"ir": 1, "af": 2}', {"ir": 1, "af": 2}),
        ("depth=3", 3),
        ("symmetric=true", True),
        ("target=pixels", "pixels"),
        ("target=a,b", "a,b"),
        ("wavelengths=null", None),
    ],
)
def test_a_field_is_json_or_a_list_without_brackets_or_a_word(text, value):
    assert config_fields([text]) == {text.partition("=")[0]: value}


def test_a_resumed_run_reads_its_checkpoint_once(tmp_path, monkeypatch):
    load, subject = torch.load, Phantom.__getitem__
    left, read = iter(range(2)), []

    def interrupted(self, index):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return subject(self, index)

    command = ["pretrain", *SMALL, "--checkpoint-every", "1", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(Phantom, "__getitem__", interrupted)
        assert main(command) == 130
    monkeypatch.setattr(torch, "load", lambda path, **options: read.append(path) or load(path, **options))
    assert main([*command, "--resume", "auto"]) == 0
    assert read == [tmp_path / "checkpoints" / "last.ckpt"]


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"mmmae \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_written(tmp_path, shell):
    with pytest.raises(SystemExit) as end:
        main(["--tyro-write-completion", shell, str(tmp_path / "completion")])
    assert not end.value.code
    written = (tmp_path / "completion").read_text()
    for word in ("pretrain", "import-spectralgpt", "learning-rate", "max-autotune"):
        assert word in written
