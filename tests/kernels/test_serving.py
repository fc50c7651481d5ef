"""What Triton kernels refuse, with the reason, and which config a launch starts."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from mmmae_kernels import explain, use_backend
from mmmae_kernels.add_layer_norm import add_layer_norm
from mmmae_kernels.gpu import autotune
from mmmae_kernels.gpu.executors import execute_by
from mmmae_kernels.gpu.launch import Config, family_of, launch, target_of

CPU = torch.device("cpu")


class Machine:
    """Stands in for a GPU of some architecture and keeps what it is told to launch."""

    def __init__(self, target):
        self.target, self.launches = target, []

    def __call__(self, launch):
        self.launches.append(launch)
        return launch.configs[-1]


class Kernel:
    """Keeps what it is started with."""

    class fn:
        __name__ = "_kernel"

    def __init__(self):
        self.started = []

    def __getitem__(self, grid):
        return lambda **arguments: self.started.append((grid, arguments))


def reason(op, *arguments):
    with execute_by(Machine("sm80")):
        return explain(op, *arguments)["triton"]


def test_float64_and_long_rows_are_refused_by_name():
    rows, wide = torch.zeros(2, 8), torch.zeros(1, 4097)
    assert reason("add_layer_norm", rows, None, rows[0], rows[0]) == "serves"
    assert "weight has dtype torch.float64" in reason("add_layer_norm", rows, None, rows[0].double(), rows[0])
    assert "x has 4097 channels" in reason("add_layer_norm", wide, None, wide[0], wide[0])
    long = torch.zeros(1, 1, 8193)
    assert "prediction has 8193 channels" in reason("masked_l2_loss", long, long)
    needy = torch.zeros(1, 1, 8, requires_grad=True)
    assert "target requires a gradient" in reason("masked_l2_loss", long[..., :8], needy)


@pytest.mark.parametrize(
    ("target", "family"),
    [
        ("sm80", "ampere"),
        ("sm89", "small"),
        ("sm100", "hopper"),
        ("gfx942", "cdna"),
        ("gfx950", "cdna"),
        ("sm75", "small"),
    ],
)
def test_an_architecture_reads_its_familys_row(target, family):
    with execute_by(Machine(target)):
        assert (target_of(CPU), family_of(CPU)) == (target, family)


def test_a_launch_goes_to_whoever_stands_in_for_the_gpu():
    machine, rows = Machine("gfx942"), torch.zeros(3, 512)
    with execute_by(machine), use_backend("triton"):
        add_layer_norm(rows, rows, rows[0], rows[0])
    (made,) = machine.launches
    assert made.grid({}) == (3,)
    assert made.configs[0].warps == 1  # of 64 threads: 8 channels each


def test_registers_are_limited_for_nvidia_alone():
    config = Config({}, warps=2, stages=3, registers=96)
    assert config.options("sm90") == {"num_warps": 2, "num_stages": 3, "maxnreg": 96}
    assert config.options("gfx942") == {"num_warps": 2, "num_stages": 3}


@pytest.mark.parametrize(("tuned", "block"), [("0", 16), ("1", 32)])
def test_a_launch_takes_the_first_config_or_the_fastest_if_asked(monkeypatch, tmp_path, tuned, block):
    times = iter([2.0, 1.0])
    monkeypatch.setenv("MMMAE_AUTOTUNE", tuned)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_found", {})
    monkeypatch.setattr(autotune.triton.testing, "do_bench", lambda run: (run(), next(times))[1])
    kernel, configs = Kernel(), (Config({"BLOCK": 16}), Config({"BLOCK": 32}))
    for _ in range(2):
        assert launch(kernel, lambda c: (1,), {"x_ptr": torch.zeros(1)}, configs).constants["BLOCK"] == block
        assert kernel.started[-1][1]["BLOCK"] == block
    assert len(kernel.started) == (4 if tuned == "1" else 2)


def test_a_grid_without_programs_is_not_launched():
    kernel = Kernel()
    launch(kernel, lambda c: (0, 4), {"x_ptr": torch.zeros(1)}, (Config({}),))
    assert kernel.started == []
