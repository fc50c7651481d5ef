"""The block's and the conditioning step's node in the types of autocast, on the Triton kernels that a GPU would run.

Products in bfloat16 and float16 run on `eager` on a CPU, sublayer by sublayer. Here a stand-in computes attention as
flash-attn does, and the other kernels are executed: by the emulator as compiled, or with TRITON_INTERPRET=1 by Triton's
interpreter.
"""

import os

import pytest

pytest.importorskip("triton", reason="needs triton")

from mmmae_kernels import use_backend
from mmmae_kernels.transformer_block import conditioning, op
from tests.cases.case import TYPES, check
from tests.cases.conditioning import CASES as CONDITIONING
from tests.cases.transformer_block import CASES as BLOCKS
from tests.emulator.gpu import Emulator, emulated

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") != "0"


def pytest_generate_tests(metafunc):
    if "types" in metafunc.fixturenames:
        if INTERPRETED:
            names = ["mixed fp16"]
        elif metafunc.config.getoption("--all-targets"):
            names = [name for name in TYPES if name != "fp32"]
        else:
            names = ["mixed bf16"]
        metafunc.parametrize("types", names)


@pytest.mark.parametrize("case", [case for case in [*BLOCKS, *CONDITIONING] if case.small], ids=str)
def test_one_node_errs_at_most_twice_as_much_as_torch(monkeypatch, on_gpu, case, types):
    def refuse(*arguments):
        raise AssertionError("it runs sublayer by sublayer")

    for module in (op, conditioning):
        monkeypatch.setattr(module, "_by_sublayer", refuse)
    on_gpu("sm80", "flash_attn_2")
    with use_backend("triton") if INTERPRETED else emulated(Emulator("sm80")):
        check(case, TYPES[types])
