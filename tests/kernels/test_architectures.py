"""Which GPUs Triton kernels run on, with which versions, why others are refused, and which rows of tables they read."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import mmmae
from mmmae_kernels import dispatch, explain, patchify, random_masking, use_backend
from mmmae_kernels.add_layer_norm import add_layer_norm
from mmmae_kernels.gpu import architecture
from mmmae_kernels.gpu.config import family_of
from mmmae_kernels.gpu.executors import execute_by

OLD = "Triton kernels need compute capability 8.0 or above"
AMD = "Triton kernels are compiled for gfx90a, gfx942, gfx1100"
REFUSED = [("sm60", OLD), ("sm70", OLD), ("sm75", OLD), ("gfx908", AMD), ("gfx950", AMD), ("gfx1201", AMD)]
SUPPORTED = ["sm80", "sm87", "sm90", "sm103", "sm121", "gfx90a", "gfx942", "gfx1100"]


class Machine:
    """Stands in for a GPU of some architecture and keeps what it is told to launch."""

    def __init__(self, target):
        self.target, self.launches = target, []

    def __call__(self, launch):
        self.launches.append(launch)
        return launch.configs[0]


def norm():
    rows = torch.ones(2, 8)
    return add_layer_norm(rows, rows, rows[0], rows[0])


@pytest.fixture
def gpus(monkeypatch):
    """Claims that the machine has GPUs of these capabilities; counts how often each is asked for its own."""
    architecture._architecture.cache_clear()
    asked = []

    def claim(*capabilities):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda index: (asked.append(index), capabilities[index])[1]
        )
        return asked

    yield claim
    architecture._architecture.cache_clear()


@pytest.mark.parametrize(("target", "needs"), REFUSED)
@pytest.mark.parametrize(
    "call",
    [norm, lambda: random_masking(2, 6, 3, seed=0), lambda: patchify(torch.ones(1, 1, 2, 4, 4), (1, 2, 2))],
    ids=["add_layer_norm", "random_masking", "patchify"],
)
def test_an_architecture_without_kernels_is_refused_with_the_reason(target, needs, call):
    machine = Machine(target)
    with execute_by(machine):
        call()
        with use_backend("triton"), pytest.raises(ValueError, match=f" is on {target}, {needs}$"):
            call()
    assert machine.launches == []


@pytest.mark.parametrize(("target", "launches"), [("sm75", False), ("sm90", True)])
def test_a_model_launches_nothing_on_an_architecture_without_kernels(target, launches):
    machine, model = Machine(target), mmmae.fast_model("tiny", image_size=32, patch=(3, 8, 8), aux={})
    mask = random_masking(2, model.config.tokens, model.config.keep, seed=0)
    with execute_by(machine):
        model(torch.randn(2, 1, 12, 32, 32), mask=mask).loss.backward()
    assert bool(machine.launches) == launches


@pytest.mark.parametrize("target", SUPPORTED)
def test_an_architecture_with_kernels_is_served(target):
    machine = Machine(target)
    with execute_by(machine), use_backend("triton"):
        norm()
    assert len(machine.launches) == 1


def test_each_architecture_is_decided_for_itself():
    for target, count in (("sm75", 0), ("sm80", 1), ("sm75", 0)):
        machine = Machine(target)
        with execute_by(machine):
            norm()
        assert len(machine.launches) == count


def test_a_machine_is_refused_where_none_of_its_gpus_is_supported(gpus):
    gpus((7, 5), (7, 0))
    assert explain("patch_embed")["triton"] == f"the GPU is sm75, {OLD}"


def test_a_gpu_is_asked_once_for_its_capability(gpus):
    asked = gpus((7, 5), (8, 0))
    for _ in range(2):
        assert explain("patch_embed")["triton"] == "serves"
        assert dispatch.device_refuses(torch.device("cuda", 0)) == f"sm75, {OLD}"
        assert dispatch.device_refuses(torch.device("cuda", 1)) is None
        dispatch.reset()
    assert asked == [0, 1]


def test_an_unsupported_gpu_of_amd_is_named_without_its_features(monkeypatch):
    architecture._architecture.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    properties = SimpleNamespace(gcnArchName="gfx1030:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert dispatch.device_refuses(torch.device("cuda", 0)) == f"gfx1030, {AMD}"
    architecture._architecture.cache_clear()


@pytest.mark.parametrize(
    ("target", "family"),
    [
        ("sm80", "ampere"),
        ("sm87", "ampere"),
        ("sm89", "small"),
        ("sm90", "hopper"),
        ("sm100", "hopper"),
        ("sm101", "hopper"),
        ("sm103", "hopper"),
        ("sm110", "hopper"),
        ("sm120", "small"),
        ("sm121", "small"),
        ("sm130", "small"),
        ("sm75", "small"),
        ("gfx942", "cdna"),
        ("gfx950", "cdna"),
        ("gfx1201", "rdna"),
    ],
)
def test_an_architecture_reads_its_familys_row_or_that_of_the_next_older_one(target, family):
    with execute_by(Machine(target)):
        assert (architecture.target_of(torch.device("cpu")), family_of(target)) == (target, family)


@pytest.mark.parametrize(
    ("version", "old"), [("3.5.1", True), ("3.6.0", False), ("3.10.0+git1", False), ("4.0", False)]
)
def test_a_triton_that_lacks_what_is_called_is_refused(monkeypatch, version, old):
    monkeypatch.setattr("triton.__version__", version)
    with execute_by(Machine("sm80")):
        assert explain("patch_embed")["triton"] == (f"triton is {version}, expected 3.6 or newer" if old else "serves")


def test_the_oldest_triton_is_the_one_that_the_package_asks_for():
    asked = re.search(r'"triton>=([\d.]+)', (Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert tuple(map(int, asked[1].split("."))) == dispatch.OLDEST_TRITON
