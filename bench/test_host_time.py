"""Host time, measured in a process of its own, as Triton's driver is chosen once a process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from bench.host_time import Host
from bench.options import Options
from mmmae_kernels import explain
from tests.emulator.stub_driver import lacking

pytest.importorskip("triton", reason="needs triton")
reason = lacking()
if reason is not None:
    pytest.skip(reason, allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("there is a GPU, whose driver torch has loaded already", allow_module_level=True)
if explain("add_layer_norm")["native"] != "serves":
    pytest.skip("needs the native library", allow_module_level=True)

OPS = ("add_layer_norm", "norm_linear", "gelu_linear", "patch_embed", "attention")
TRIES = 3


class HostTimes:
    """The best times of each contender, of one measurement or more."""

    def __init__(self) -> None:
        self.hosts = self.measured()

    def measured(self) -> dict[str, Host]:
        """Return the best times of each case, measured now."""
        command = [sys.executable, "-m", "bench.host_time", "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {case: Host(case, contenders) for case, contenders in json.loads(done.stdout)}

    def check(self, case: str, contender: str, bound: float) -> None:
        """Compare a contender's time forward and backward over the first one's with a bound.

        Other work on the machine only adds time. So where the bound does not hold, all is measured again, and the best
        of all measurements counts: of the baseline too, so that the ratio is not the smallest of several.
        """
        for _ in range(TRIES - 1):
            if self.ratio(case, contender) <= bound:
                return
            again = self.measured()
            self.hosts = {case: host.best_of(again[case]) for case, host in self.hosts.items()}
        assert self.ratio(case, contender) <= bound

    def ratio(self, case: str, contender: str) -> float:
        """Return the time of a contender, forward and backward, over that of the first one."""
        return self.hosts[case].ratios()[contender][2]


@pytest.fixture(scope="module")
def host_times() -> HostTimes:
    """All cases, measured once, and again where a bound does not hold."""
    return HostTimes()


@pytest.fixture(scope="module")
def slack(request: pytest.FixtureRequest) -> float:
    """The factor that a bound is widened by: a quick run only shows that nothing has gone far wrong."""
    return 1.25 if Options.of(request.config).quick else 1.0


@pytest.mark.parametrize("kernels", ["native", "triton"])
@pytest.mark.parametrize("images", ["no images", "three images"])
def test_a_step_takes_no_more_host_time_than_the_reference_with_sdpa(
    host_times: HostTimes, slack: float, images: str, kernels: str
) -> None:
    host_times.check(f"step, {images}", kernels, 1.0 * slack)


@pytest.mark.parametrize("op", OPS)
def test_an_op_takes_at_most_one_and_a_half_times_the_host_time_of_plain_pytorch(
    host_times: HostTimes, slack: float, op: str
) -> None:
    host_times.check(op, "native", 1.5 * slack)


# In Triton the norms were aimed at 1.5 too, see docs/performance.md.
@pytest.mark.parametrize(
    ("op", "bound"), [("add_layer_norm", 2.0), ("norm_linear", 2.0), ("gelu_linear", 1.5), ("patch_embed", 1.5)]
)
def test_an_op_in_triton_takes_little_more(host_times: HostTimes, slack: float, op: str, bound: float) -> None:
    host_times.check(op, "triton", bound * slack)
