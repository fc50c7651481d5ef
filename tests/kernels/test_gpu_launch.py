"""Refusals of the Triton kernels with their reasons, and the plans and configs by which a kernel is launched."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from mmmae_kernels import explain, use_backend
from mmmae_kernels.add_layer_norm import add_layer_norm
from mmmae_kernels.gpu import autotune, plans
from mmmae_kernels.gpu.config import Config, Launch
from mmmae_kernels.gpu.executors import StandInGpu, execute_by
from mmmae_kernels.gpu.launch import launch


class Machine:
    """Stands in for a GPU of some architecture and keeps what it is told to launch."""

    def __init__(self, target):
        self.target, self.launches = target, []

    def __call__(self, launch):
        self.launches.append(launch)
        return launch.configs[-1]


class Kernel:
    """Keeps what it is started with."""

    arg_names = ("x_ptr", "D", "BLOCK")

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


def test_a_launch_goes_to_whoever_stands_in_for_the_gpu():
    machine, rows = Machine("gfx942"), torch.zeros(3, 512)
    with execute_by(machine), use_backend("triton"):
        add_layer_norm(rows, rows, rows[0], rows[0])
    (made,) = machine.launches
    assert made.grid({}) == (3, 1)  # rows, and stacked weights
    assert made.configs[0].warps == 1  # of 64 threads: 8 channels each


def test_registers_are_limited_for_nvidia_alone():
    config = Config({}, warps=2, stages=3, registers=96)
    options = {"num_warps": 2, "num_stages": 3, "enable_fp_fusion": True}
    assert config.options("sm90") == {**options, "maxnreg": 96}
    assert config.options("gfx942") == options


@pytest.mark.parametrize(("tuned", "block"), [("0", 16), ("1", 32)])
def test_a_launch_takes_the_first_config_or_the_fastest_if_asked(monkeypatch, tmp_path, tuned, block):
    times = iter([2.0, 1.0])
    monkeypatch.setenv("MMMAE_AUTOTUNE", tuned)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "_found", {})
    monkeypatch.setattr(autotune.triton.testing, "do_bench", lambda run: (run(), next(times))[1])
    kernel, configs = Kernel(), (Config({"BLOCK": 16}), Config({"BLOCK": 32}))

    def describe(target, width):
        return Launch(kernel, lambda c: (1,), {"D": width}, configs)

    for _ in range(2):
        assert launch(describe, (torch.zeros(1),), (1,)).constants["BLOCK"] == block
        assert kernel.started[-1][1]["BLOCK"] == block
    assert len(kernel.started) == (4 if tuned == "1" else 2)


def test_a_grid_without_programs_is_not_launched():
    kernel = Kernel()
    launch(lambda target: Launch(kernel, lambda c: (0, 4), {}, (Config({}),)), (torch.zeros(1),), ())
    assert kernel.started == []


class Machinery:
    """Stands in for Triton: a kernel that is compiled when it is first started, and the driver of device 0."""

    arg_names = ("x_ptr", "y_ptr", "D", "BLOCK")

    class fn:
        __name__ = "_kernel"

    def __init__(self):
        self.by_triton, self.by_plan, self.device, self.stream = [], [], 0, 7
        self.compiled = SimpleNamespace(run=lambda *a: self.by_plan.append(a), function=11, packed_metadata="packed")
        self.active = SimpleNamespace(
            get_current_device=lambda: self.device, get_current_stream=lambda device: (device, self.stream)
        )

    def __getitem__(self, grid):
        return lambda **arguments: (self.by_triton.append(arguments), self.compiled)[1]

    def launch(self, *tensors, width=5):
        return launch(self.describe, tensors, (width,))

    def describe(self, target, width):
        return Launch(self, lambda c: (width, c["BLOCK"]), {"D": width}, (Config({"BLOCK": 16}),))


@pytest.fixture
def machinery(monkeypatch):
    machinery = Machinery()
    machinery.describe = machinery.describe  # one object, as a function of a module is
    monkeypatch.setattr(plans, "driver", SimpleNamespace(active=machinery.active))
    monkeypatch.setattr(plans, "_runtime", SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None))
    with execute_by(StandInGpu("sm90")):
        yield machinery


def test_a_launch_like_one_before_is_started_by_its_plan(machinery):
    for stream in (7, 8):
        machinery.stream = stream
        x = torch.zeros(3)
        assert machinery.launch(x, None).constants == {"BLOCK": 16}
    assert [list(arguments) for arguments in machinery.by_triton] == [["x_ptr", "y_ptr", "D", "BLOCK"]]
    assert machinery.by_plan == [(5, 16, 1, (0, 8), 11, "packed", None, None, None, x.data_ptr(), 0, 5, 16)]


@pytest.mark.parametrize(
    "other",
    [
        lambda x: ((x.half(), None), 5),
        lambda x: ((x, x), 5),
        lambda x: ((x[1:], None), 5),
        lambda x: ((x, None), 6),
    ],
    ids=["type", "a tensor for None", "alignment", "number"],
)
def test_a_launch_that_differs_is_planned_anew(machinery, other):
    x = torch.zeros(3)
    machinery.launch(x, None)
    tensors, width = other(x)
    machinery.launch(*tensors, width=width)
    assert (len(machinery.by_triton), len(machinery.by_plan)) == (2, 0)


def test_alignment_is_each_tensors_own(machinery):
    """To 16 bytes: one that lies 8 further is misaligned, also where its neighbour is so anyway."""
    x, y = torch.zeros(8), torch.zeros(8)
    for tensors in ((x[1:], y), (x[1:], y[2:]), (x, y[2:])):
        machinery.launch(*tensors)
    assert (len(machinery.by_triton), len(machinery.by_plan)) == (3, 0)
    machinery.launch(x[2:], y[1:])
    assert (len(machinery.by_triton), len(machinery.by_plan)) == (3, 1)


def test_launches_go_tritons_way_while_somebody_listens(machinery, monkeypatch):
    x = torch.zeros(3)
    machinery.launch(x, None)
    chain = SimpleNamespace(calls=[print])
    for hooks in ((chain, None), (None, print)):
        hooked = SimpleNamespace(launch_enter_hook=hooks[0], launch_exit_hook=hooks[1])
        monkeypatch.setattr(plans, "_runtime", hooked)
        machinery.launch(x, None)
    assert (len(machinery.by_triton), len(machinery.by_plan)) == (3, 0)
    chain.calls.clear()
    monkeypatch.setattr(plans, "_runtime", SimpleNamespace(launch_enter_hook=chain, launch_exit_hook=chain))
    machinery.launch(x, None)
    assert len(machinery.by_plan) == 1


@pytest.mark.parametrize("lacking", ["run", "function", "packed_metadata"])
def test_what_triton_gives_without_a_handle_is_always_started_by_triton(machinery, lacking):
    delattr(machinery.compiled, lacking)
    for _ in range(2):
        machinery.launch(torch.zeros(3), None)
    assert (len(machinery.by_triton), len(machinery.by_plan)) == (2, 0)


def test_a_plan_starts_on_its_own_device(machinery, monkeypatch):
    x = torch.zeros(3)
    machinery.launch(x, None)
    entered = []

    @contextlib.contextmanager
    def current(device):
        entered.append(device)
        machinery.device, before = device, machinery.device
        yield
        machinery.device = before

    monkeypatch.setattr(torch.cuda, "device", current)
    machinery.device = 1
    machinery.launch(x, None)
    assert (entered, machinery.device) == ([0], 1)
    assert machinery.by_plan[0][3] == (0, 7)


def test_plans_start_over_where_sizes_never_repeat(machinery, monkeypatch):
    monkeypatch.setattr("mmmae_kernels.gpu.launch.MOST_PLANS", 2)
    for width in (1, 2, 3, 3):
        machinery.launch(torch.zeros(3), None, width=width)
    assert (len(machinery.by_triton), len(machinery.by_plan)) == (3, 1)


def test_a_launch_that_cannot_be_tuned_yet_gets_no_plan(machinery, monkeypatch):
    configs = Config({"BLOCK": 16}), Config({"BLOCK": 32})
    machinery.describe = lambda target, width: Launch(machinery, lambda c: (width,), {"D": width}, configs)
    answers = iter([None, None, configs[1]])
    monkeypatch.setenv("MMMAE_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "fastest", lambda *_: next(answers))
    describe, x = machinery.describe, torch.zeros(3)
    assert [launch(describe, (x, None), (5,)).constants["BLOCK"] for _ in range(5)] == [16, 16, 32, 32, 32]
    assert (len(machinery.by_triton), len(machinery.by_plan)) == (3, 2)


class Launcher:
    """As Triton's: Python in front of a C function."""

    global_scratch_size = profile_scratch_size = 0
    cooperative, packs = False, True

    def __init__(self, started):
        self.launch = lambda *arguments: started.append(arguments)

    def __call__(self, x, y, z, stream, function, *rest):
        ahead, parameters = rest[:4], rest[4:]
        self.launch(x, y, z, stream, function, self.cooperative, *ahead, *([parameters] if self.packs else parameters))


START = plans.Start(None, (5, 16, 1), (11, "packed", None, None, None))


@pytest.mark.parametrize("packs", [True, False])
def test_the_python_in_front_of_a_launcher_is_left_out(packs):
    started = []
    launcher = Launcher(started)
    launcher.packs = packs
    start = plans.shortened(START._replace(function=launcher), 3)
    assert started == []
    assert (start.function, start.packed) == (launcher.launch, packs)
    start.function(*start.before, 7, *start.after, *([(1, 2, 3)] if packs else (1, 2, 3)))
    launcher(*START.before, 7, *START.after, 1, 2, 3)
    assert started[0] == started[1]


@pytest.mark.parametrize(
    "other",
    [
        {"global_scratch_size": 128},
        {"profile_scratch_size": 8},
        {"__call__": lambda *_: None},
        {"__init__": lambda *_: None},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_launcher_of_another_kind_is_called_itself(other):
    started = []
    launcher = type("Other", (Launcher,), other)(started)
    start = START._replace(function=launcher)
    assert plans.shortened(start, 3) is start
    assert started == []
