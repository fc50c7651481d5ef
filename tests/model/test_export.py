"""Exported models give the same tokens or logits, from files that do not need this package."""

import json
import subprocess
import sys
import zipfile

import pytest
import torch

import mmmae
from mmmae.cli import main
from mmmae.data import Normalization
from mmmae.model import export
from mmmae.model.finetuned import build, save_finetuned

pytestmark = pytest.mark.xdist_group("export")  # whose files are written once
FIELDS = {"image_size": 32, "patch": (3, 8, 8), "aux": {}}
FORMATS = [".pt2", ".onnx"]
CLASSES = ["bare soil", "wheat, winter", "water"]
STATISTICS = Normalization({"hsi": tuple((band, band + 1.0, band + 4.0) for band in range(12))})


def changed(module):
    with torch.no_grad():
        for parameter in module.parameters():  # norms and biases too must matter
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return module


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return changed(mmmae.HSIEncoder(mmmae.MMMAEConfig.preset("tiny", activation_checkpointing=True, **FIELDS)))


@pytest.fixture(scope="module")
def files(encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    encoder.save_pretrained(folder / "encoder")
    for suffix in FORMATS:
        assert export.export_encoder(encoder, folder / f"encoder{suffix}") <= export.TOLERANCE
    return folder


@pytest.fixture(autouse=True)
def packages(request):
    if "onnx" in request.node.name:
        for package in export.ONNX_PACKAGES:
            pytest.importorskip(package)


def volume(batch):
    return torch.randn(batch, 1, 12, 32, 32, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_torch_program_equals_the_encoder(encoder, files, batch):
    program = torch.export.load(files / "encoder.pt2")
    plain = mmmae.reference_model(encoder.config, attention="sdpa").hsi_encoder()
    plain.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        tokens = program.module()(volume(batch))
        assert torch.equal(tokens, plain(volume(batch)))
        assert (tokens - encoder(volume(batch))).abs().max() <= 1e-4


def test_the_help_names_the_batches_that_are_checked(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "batch may have any size from 1" in " ".join(capsys.readouterr().out.split())


def test_a_torch_program_is_made_of_torchs_own_operators(files):
    nodes = torch.export.load(files / "encoder.pt2").graph.nodes
    operators = {str(node.target) for node in nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") or name == "<built-in function getitem>" for name in operators), operators


def test_a_torch_program_holds_no_pickle(files):
    with zipfile.ZipFile(files / "encoder.pt2") as archive:
        for name in archive.namelist():
            assert not name.endswith(".pkl")
            assert not archive.read(name).startswith(b"PK"), name  # an archive in the archive, as torch.save makes


def test_a_torch_program_runs_where_this_package_is_not(encoder, files, tmp_path):
    torch.save(volume(3), tmp_path / "hsi.pt")
    code = f"""
import sys
sys.modules["mmmae"] = sys.modules["mmmae_kernels"] = None  # importing them is an error
import torch
tokens = torch.export.load({str(files / "encoder.pt2")!r}).module()(torch.load("hsi.pt"))
torch.save(tokens.detach(), "tokens.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with torch.no_grad():
        assert (torch.load(tmp_path / "tokens.pt") - encoder(volume(3))).abs().max() <= 1e-4


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_an_onnx_model_equals_the_encoder(encoder, files, batch):
    import onnxruntime

    session = onnxruntime.InferenceSession(files / "encoder.onnx", providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape) == ("hsi", ["batch", 1, 12, 32, 32])
    assert (made.name, made.shape) == ("tokens", ["batch", 64, 64])
    (tokens,) = session.run(None, {"hsi": volume(batch).numpy()})
    with torch.no_grad():
        assert (torch.from_numpy(tokens) - encoder(volume(batch))).abs().max() <= 1e-4


def test_an_onnx_model_has_standard_operators_of_one_opset(files):
    import onnx

    model = onnx.load(files / "encoder.onnx")
    onnx.checker.check_model(model)
    assert [(used.domain, used.version) for used in model.opset_import] == [("", export.OPSET)]
    assert len(model.functions) == 0


def test_an_encoder_stays_as_it_is(encoder, files):
    assert encoder.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_command_says_shapes_and_difference(files, tmp_path, capsys, suffix):
    out = tmp_path / f"e{suffix}"
    assert main(["export", str(files / "encoder"), "--out", str(out), "--set", "image_size=16"]) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out}" in printed
    assert "hsi [batch, 1, 12, 16, 16] float32 -> tokens [batch, 16, 64] float32" in printed
    assert "largest difference from PyTorch" in printed
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.parametrize(("suffix", "wrong"), [(".pt2", 2e-4), (".pt2", float("nan")), (".onnx", 2e-4)])
def test_a_program_with_other_tokens_is_not_written(encoder, tmp_path, monkeypatch, suffix, wrong):
    measured = iter([wrong, 0.0])
    monkeypatch.setattr(export, "_difference", lambda *_: next(measured))
    with pytest.raises(ValueError, match=r"not written: the tokens differ from the model's by (2.0e-04|nan), expected"):
        export.export_encoder(encoder, tmp_path / f"e{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_the_check_sees_a_wrong_weight(encoder, tmp_path, monkeypatch):
    other = mmmae.HSIEncoder(encoder.config)
    program = export._plain_program(export.Exported(other, other.config, "tokens", {}))
    monkeypatch.setattr(export, "_plain_program", lambda _: program)
    with pytest.raises(ValueError, match="not written"):
        export.export_encoder(encoder, tmp_path / "e.pt2")


def test_what_can_not_be_exported_is_refused_before_any_work(encoder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"the suffix is '\.pth', expected \.pt2 .* or \.onnx"):
        export.export_encoder(encoder, tmp_path / "e.pth")
    with pytest.raises(ValueError, match="expected a file in a folder that exists"):
        export.export_encoder(encoder, tmp_path / "absent" / "e.pt2")
    half = mmmae.HSIEncoder(encoder.config).bfloat16()
    with pytest.raises(ValueError, match=r"pos_embed_spatial is torch.bfloat16 on cpu, expected torch.float32"):
        export.export_encoder(half, tmp_path / "e.pt2")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(ValueError, match=r"ONNX needs onnxscript: pip install 'mmmae\[onnx\]'"):
        export.export_encoder(encoder, tmp_path / "e.onnx")


def test_weights_beyond_the_limit_of_an_onnx_file_are_refused(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "ONNX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"expected less than 2 for an ONNX file; export to \.pt2"):
        export.export_encoder(encoder, tmp_path / "e.onnx")


@pytest.fixture(scope="module", params=["segmentation", "classification"])
def finetuned(request, tmp_path_factory):
    """A model in training mode, its task, and a folder with the files that the command and the function wrote."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp(request.param)
    config = mmmae.MMMAEConfig.preset("tiny", wavelengths=[450 + 40 * band for band in range(12)], **FIELDS)
    model = changed(build(request.param, mmmae.HSIEncoder(config), len(CLASSES), freeze_encoder=True))
    save_finetuned(folder / "model", model, CLASSES, window=24)  # of tiles, which the program does not take
    STATISTICS.save(folder / "model" / "normalization.json")
    if request.param == "segmentation":
        export.export_finetuned(model, CLASSES, folder / "model.pt2", normalization=STATISTICS.to_json())
    if all(map(export.importlib.util.find_spec, export.ONNX_PACKAGES)):
        assert main(["export", str(folder / "model"), "--out", str(folder / "model.onnx")]) == 0
    return model, request.param, folder


def check_metadata(found, task):
    assert (found["task"], found["classes"], "window" in found) == (task, CLASSES, False)
    assert Normalization.from_json(found["normalization"]) == STATISTICS
    assert found["input"]["shape"] == ["batch", 1, 12, 32, 32]
    assert found["input"]["wavelengths"] == [450 + 40 * band for band in range(12)]
    assert found["output"]["shape"] == ["batch", 3, *([32, 32] if task == "segmentation" else [])]


@pytest.mark.parametrize("finetuned", ["segmentation"], indirect=True)
def test_a_torch_program_of_a_fine_tuned_model_gives_its_logits_and_knows_its_classes(finetuned):
    model, task, folder = finetuned
    assert all(module.training for module in model.modules())
    assert model.freeze_encoder
    assert isinstance(model.encoder, mmmae.HSIEncoder)
    extra = {"metadata.json": ""}
    program = torch.export.load(folder / "model.pt2", extra_files=extra)
    model.eval()
    check_metadata(json.loads(extra["metadata.json"]), task)
    with torch.no_grad():
        logits = program.module()(volume(5))
        assert (logits - model(volume(5))).abs().max() <= 1e-4
    assert logits.std() > 0.01


def test_an_onnx_model_of_a_fine_tuned_model_gives_its_logits_and_knows_its_classes(finetuned):
    import onnxruntime

    model, task, folder = finetuned
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    check_metadata({key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}, task)
    (logits,) = session.run(["logits"], {"hsi": volume(5).numpy()})
    model.eval()
    with torch.no_grad():
        assert (torch.from_numpy(logits) - model(volume(5))).abs().max() <= 1e-4


def test_a_classifier_of_windows_around_pixels_gives_logits_of_each(tmp_path):
    model = changed(build("pixels", mmmae.HSIEncoder(mmmae.MMMAEConfig.preset("tiny", **FIELDS)), len(CLASSES)))
    save_finetuned(tmp_path / "model", model, CLASSES, numbers=[1, 2, 17], window=31)
    assert main(["export", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "model.pt2")]) == 0
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    metadata = json.loads(extra["metadata.json"])
    assert (metadata["output"]["shape"], metadata["numbers"], metadata["window"]) == (["batch", 3], [1, 2, 17], 31)
    assert program.module()(volume(2)).shape == (2, 3)


@pytest.mark.parametrize("finetuned", ["segmentation"], indirect=True)
def test_fields_of_a_fine_tuned_model_can_not_be_changed(finetuned, tmp_path, capsys):
    folder = finetuned[2]
    assert main(["export", str(folder / "model"), "--out", str(tmp_path / "m.pt2"), "--set", "image_size=16"]) == 2
    assert "the head of a fine-tuned model fits its own encoder alone" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [[], ["one", "--model", "other"]], ids=["none", "two"])
def test_the_folder_of_one_model_is_expected(tmp_path, capsys, words):
    assert main(["export", *words, "--out", str(tmp_path / "model.pt2")]) == 2
    assert "expected the folder of one model, as in mmmae export RUN/model" in capsys.readouterr().err
