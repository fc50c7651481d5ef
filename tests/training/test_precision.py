"""Which precision `auto` is on a GPU or a CPU, where products are in TF32, and what a run stores and says of it."""

import json
from types import SimpleNamespace

import pytest
import torch

from mmmae.precision import best_precision, describe_precision, use_tf32
from mmmae.training import pretrain as recipe
from mmmae.training.pretrain import pretrain
from mmmae.training.settings import PretrainSettings
from mmmae_kernels.gpu import architecture
from tests.training.test_pretrain import CONFIG, phantom

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that claims a GPU of a compute capability, or of an architecture of AMD."""
    monkeypatch.delenv("MMMAE_TF32", raising=False)
    before = torch.get_float32_matmul_precision()

    def claim(target):
        architecture._architecture.cache_clear()
        if isinstance(target, str):
            monkeypatch.setattr(torch.version, "hip", "6.4")
            monkeypatch.setattr(
                torch.cuda, "get_device_properties", lambda index: SimpleNamespace(gcnArchName=f"{target}:xnack-")
            )
        else:
            monkeypatch.setattr(torch.version, "hip", None)
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: target)

    yield claim
    architecture._architecture.cache_clear()
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("target", "precision", "tf32"),
    [
        ((7, 0), "32", False),
        ((7, 5), "32", False),
        ((8, 0), "bf16", True),
        ((9, 0), "bf16", True),
        ((12, 0), "bf16", True),
        ("gfx906", "32", False),
        ("gfx942", "bf16", False),
    ],
    ids=str,
)
def test_a_gpu_with_matrix_units_trains_in_bfloat16_and_multiplies_float32_in_tf32(gpu, target, precision, tf32):
    gpu(target)
    assert best_precision(GPU) == precision
    assert torch.get_float32_matmul_precision() == "highest"
    assert use_tf32(GPU) == tf32
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    said = f"precision auto is {precision}"
    assert describe_precision(GPU) == (f"{said}; precision 32 multiplies in TF32" if tf32 else said)


def test_a_cpu_trains_in_float32_exactly(gpu):
    gpu((9, 0))  # beside it
    assert best_precision(torch.device("cpu")) == "32"
    assert not use_tf32(torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_variable_keeps_products_exact(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setenv("MMMAE_TF32", "0")
    assert not use_tf32(GPU)
    assert torch.get_float32_matmul_precision() == "highest"
    assert describe_precision(GPU) == "precision auto is bf16; precision 32 multiplies exactly"


@pytest.mark.parametrize(("precision", "said"), [("auto", "bf16"), ("32", "32, matrix products in TF32"), ("16", "16")])
def test_a_run_says_and_stores_its_precision(gpu, monkeypatch, tmp_path, capsys, precision, said):
    class Reached(Exception):
        pass

    def stop(*arguments):
        raise Reached(arguments)

    gpu((8, 0))
    monkeypatch.setattr(recipe, "_device", lambda settings, world: GPU)
    monkeypatch.setattr(recipe, "fast_model", lambda config: None)
    monkeypatch.setattr(recipe, "RunFolder", stop)
    with pytest.raises(Reached) as reached:
        pretrain(CONFIG, phantom(), tmp_path, PretrainSettings(precision=precision, batch=2))
    _, described, *_ = reached.value.args[0]
    assert described["settings"]["precision"] == said.split(",")[0]
    assert capsys.readouterr().out == f"precision {said}\n"


def test_a_run_on_the_cpu_stores_float32_and_is_resumed_in_its_precision(tmp_path):
    settings = PretrainSettings(steps=1, batch=2, warmup=0)
    pretrain(CONFIG, phantom(), tmp_path, settings)
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["precision"] == "32"
    started = SimpleNamespace(settings={"precision": "bf16"})
    assert recipe._with_precision(settings, torch.device("cpu"), started).precision == "bf16"
    assert recipe._with_precision(settings, torch.device("cpu"), None).precision == "32"
    asked = PretrainSettings(precision="32")
    assert recipe._with_precision(asked, torch.device("cpu"), started) is asked
