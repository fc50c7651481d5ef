"""Which precision `auto` is on a GPU or a CPU, where products are in TF32, and what a run stores and says of it."""

import json
from types import SimpleNamespace

import pytest
import torch

import mmmae
from mmmae import precision as choice
from mmmae.model.layers import Block
from mmmae.precision import Speeds, best_precision, describe_precision, measure_speeds, use_tf32
from mmmae.training import pretrain as recipe
from mmmae.training.finetuning.finetune import finetune
from mmmae.training.finetuning.labels import read_class_labels
from mmmae.training.finetuning.settings import FinetuneSettings
from mmmae.training.inference.encode import encode
from mmmae.training.inference.reconstruct import reconstruct
from mmmae.training.pretrain import pretrain
from mmmae.training.settings import PretrainSettings
from mmmae_kernels.gpu import architecture
from tests.training.test_pretrain import CONFIG, phantom

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that claims a GPU of a compute capability, or of an architecture of AMD."""
    for variable in ("MMMAE_TF32", "MMMAE_PRECISION"):
        monkeypatch.delenv(variable, raising=False)
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


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """Return a function that claims a CPU with some flags, on which layers take these milliseconds in both types.

    The function returns a list of the widths that are measured.
    """
    monkeypatch.delenv("MMMAE_PRECISION", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def claim(flags, float32=1.0, bfloat16=1.0):
        choice._measured_speeds.cache_clear()
        (tmp_path / "cpuinfo").write_text(f"model name\t: A CPU\nflags\t\t: fpu {flags} avx2\n")
        monkeypatch.setattr(choice, "CPUINFO", tmp_path / "cpuinfo")
        measured = []
        monkeypatch.setattr(choice, "measure_speeds", lambda width: measured.append(width) or Speeds(float32, bfloat16))
        return measured

    yield claim
    choice._measured_speeds.cache_clear()


def test_a_cpu_multiplies_float32_exactly(gpu, cpu):
    gpu((9, 0))  # beside it
    cpu("avx512f")
    assert best_precision(CPU) == "32"
    assert not use_tf32(CPU)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_cpu_without_instructions_for_bfloat16_is_not_measured(cpu):
    measured = cpu("avx512f avx512_bf16x", 9.0, 1.0)
    assert best_precision(CPU) == "32"
    assert describe_precision(CPU) == "precision auto is 32: this CPU has no instructions for bfloat16"
    assert measured == []


@pytest.mark.parametrize("flags", ["avx512_bf16", "amx_tile amx_bf16"])
@pytest.mark.parametrize(("milliseconds", "precision"), [(0.8, "bf16"), (0.81, "32"), (1.5, "32")])
def test_a_cpu_trains_in_bfloat16_where_that_is_a_quarter_faster(cpu, flags, milliseconds, precision):
    cpu(flags, 1.0, milliseconds)
    assert best_precision(CPU) == precision
    said = f"a layer of width 768 is {1 / milliseconds:.1f} times as fast in bfloat16"
    assert describe_precision(CPU).startswith(f"precision auto is {precision}: {said}")


def test_a_cpu_is_measured_once_for_each_width(cpu):
    measured = cpu("amx_bf16", 4.0, 1.0)
    for width in (64, 768, 64):
        assert best_precision(CPU, width) == "bf16"
    assert measured == [64, 768]
    again = cpu("amx_bf16", 1.0, 4.0)  # in another process
    assert [best_precision(CPU, width) for width in (64, 768, 512)] == ["bf16", "bf16", "32"]
    assert again == [512]


def test_a_broken_file_of_a_measurement_is_replaced(cpu):
    cpu("amx_bf16", 4.0, 1.0)
    best_precision(CPU)
    (file,) = choice.folder().glob("*.json")
    for content in ("", "[1]", '{"float32_ms": 4.0}', '{"float32_ms": null, "bfloat16_ms": 1}'):
        file.write_text(content)
        assert cpu("amx_bf16", 4.0, 1.0) == []
        assert best_precision(CPU) == "bf16"
        assert json.loads(file.read_text())["bfloat16_ms"] == 1.0


def test_a_cpu_without_a_folder_to_write_is_measured_all_the_same(cpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    measured = cpu("amx_bf16", 4.0, 1.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [best_precision(CPU), best_precision(CPU)] == ["bf16", "bf16"]
    assert measured == [768]


def test_a_measurement_changes_neither_seed_nor_threads(monkeypatch):
    threads = []
    linear = choice.F.linear
    monkeypatch.setattr(choice.F, "linear", lambda *pair: threads.append(torch.get_num_threads()) or linear(*pair))
    state, before = torch.get_rng_state(), torch.get_num_threads()
    assert min(measure_speeds(8)) > 0
    assert set(threads) == {1}
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("device", [GPU, CPU], ids=str)
def test_a_variable_decides_for_every_device(gpu, cpu, monkeypatch, device):
    gpu((9, 0))
    measured = cpu("amx_bf16", 4.0, 1.0)
    for precision in ("32", "bf16"):
        monkeypatch.setenv("MMMAE_PRECISION", precision)
        assert best_precision(device) == precision
        assert describe_precision(device).startswith(f"precision auto is {precision} by MMMAE_PRECISION")
    assert measured == []
    monkeypatch.setenv("MMMAE_PRECISION", "16")
    with pytest.raises(ValueError, match="MMMAE_PRECISION is '16', must be one of 32, bf16"):
        best_precision(device)


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


@pytest.mark.parametrize(("milliseconds", "precision"), [(0.5, "bf16"), (1.0, "32")])
def test_a_run_on_the_cpu_stores_and_says_its_precision_and_is_resumed_in_it(
    cpu, tmp_path, capsys, milliseconds, precision
):
    measured = cpu("avx512_bf16", 1.0, milliseconds)
    settings = PretrainSettings(steps=1, batch=2, warmup=0)
    pretrain(CONFIG, phantom(), tmp_path, settings)
    assert measured == [CONFIG.dim]
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["precision"] == precision
    assert ("precision bf16\n" in capsys.readouterr().out) == (precision == "bf16")
    for resumed in ("32", "bf16"):
        started = SimpleNamespace(settings={"precision": resumed})
        assert recipe._with_precision(settings, CPU, CONFIG.dim, started).precision == resumed
    assert recipe._with_precision(settings, CPU, CONFIG.dim, None).precision == precision
    asked = PretrainSettings(precision="32")
    assert recipe._with_precision(asked, CPU, CONFIG.dim, started) is asked


def test_processes_that_chose_different_precisions_stop(monkeypatch, tmp_path):
    monkeypatch.setattr(recipe, "gather_objects", lambda mine: [mine, (0, "bf16")])
    with pytest.raises(ValueError, match=r"the precisions \['32', 'bf16'\]; give --precision 32 or bf16"):
        pretrain(CONFIG, phantom(), tmp_path, PretrainSettings(steps=1, batch=2, warmup=0, precision="32"))


@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_inference_computes_in_the_precision_that_is_asked_for(monkeypatch, tmp_path, precision):
    config = CONFIG.replace(aux=phantom().modalities)
    seen = []

    def forward(self, stream, ids):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32)
        return transform(self, stream, ids)

    transform = Block.transform
    monkeypatch.setattr(Block, "transform", forward)
    model = mmmae.fast_model(config)
    encode(model.hsi_encoder(), phantom(), tmp_path / "features.npz", precision=precision)
    reconstruct(model, phantom(), tmp_path / "pictures", first=1, precision=precision)
    assert set(seen) == {{"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}[precision]}


@pytest.mark.parametrize("precision", ["auto", "16"])
def test_fine_tuning_runs_in_its_precision_and_stores_it(cpu, tmp_path, capsys, precision):
    cpu("amx_bf16", 4.0, 1.0)
    subjects = phantom()
    (tmp_path / "labels.csv").write_text("".join(f"{row}\n" for row in labelled(subjects.names)))
    labels = read_class_labels(tmp_path / "labels.csv", subjects)
    seen = []
    encoder = mmmae.fast_model(CONFIG).hsi_encoder()
    encoder.blocks[0].norm1.register_forward_hook(
        lambda *_: seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
    )
    settings = FinetuneSettings(epochs=1, batch=4, precision=precision)
    finetune(encoder, subjects, labels, tmp_path / "run", settings, validation=0.5, maps=0)
    chosen = "bf16" if precision == "auto" else "16"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["precision"] == chosen
    assert f"precision {chosen}\n" in capsys.readouterr().out
    assert set(seen) == {{"bf16": torch.bfloat16, "16": torch.float16}[chosen]}


def labelled(names):
    return ["name,label", *(f"{name},{number % 2}" for number, name in enumerate(names))]
