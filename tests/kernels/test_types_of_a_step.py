"""Each dtype that a kernel gets in a training step under autocast is tested by a case, and compiled ahead of time."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

import mmmae
from mmmae_kernels import operators, random_masking, use_backend
from mmmae_kernels.aot.cases import CASES as COMPILED
from mmmae_kernels.aot.rows import Recorder
from mmmae_kernels.gpu.executors import execute_by
from tests.cases.case import TYPES, results
from tests.cases.ops import CASES

SIZES = {"image_size": 32, "dim": 32, "heads": 2, "depth": 2, "aux_dim": 32, "aux_depth": 2, "aux_patch": 16}
SIZES |= {"decoder_dim": 32, "decoder_heads": 2, "decoder_depth": 2}
MODELS = [
    {},
    {"aux": {}},
    {"conditioning_depth": 2},
    {"normalize_target": True},
    {"target": "pixels"},
    {"target": "pixels", "normalize_target": True},
    {"decode_fraction": 0.5},
    {"activation_checkpointing": True},
    {"residual_stream": "bfloat16"},
]


class Dtypes:
    """An executor that runs nothing and keeps which kernels were launched with which dtypes."""

    target = "sm90"

    def __init__(self):
        self.launches = set()

    def __call__(self, launch):
        self.launches.add(dtypes_of(launch))
        return launch.configs[0]


def dtypes_of(launch):
    """Return the kernel's name and the dtype of each of its tensors, None for a missing one."""
    pointers = [(name, value) for name, value in launch.arguments.items() if name.endswith("_ptr")]
    return launch.kernel.fn.__name__, *((name, None if value is None else value.dtype) for name, value in pointers)


@pytest.fixture
def launched(on_gpu, monkeypatch):
    """Return a function that calls another and returns its launches; nothing is computed, neither is attention."""
    on_gpu("sm90", "flash_attn_2")
    kernels = operators._direct["triton"]
    monkeypatch.setattr(kernels, "attention_forward", attention_forward)
    monkeypatch.setattr(
        kernels, "attention_backward", lambda grad, projected, *rest: [*map(torch.zeros_like, projected)]
    )

    def run(function, *arguments):
        executor = Dtypes()
        with execute_by(executor), use_backend("triton"):
            function(*arguments)
        return executor.launches

    return run


def attention_forward(projected, *rest):
    q = projected[0] if projected[0].dim() == 4 else projected[0].select(2, 0)
    return q.new_zeros(q.shape), q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


def train(options, half):
    """Run forward and backward of a small model under autocast, and its encoder."""
    config = mmmae.MMMAEConfig.preset("base", **{**SIZES, **options})
    model = mmmae.fast_model(config, kernels="triton")
    hsi = torch.randn(2, 1, config.bands, config.image_size, config.image_size)
    aux = {name: torch.randn(2, channels, 32, 32) for name, channels in config.aux.items()}
    # Tables that were drawn by a kernel that does not run would hold no token numbers.
    with use_backend("eager"):
        mask = random_masking(2, config.tokens, config.keep, seed=0)
    for valid in (None, torch.ones(2, 32, 32, dtype=torch.bool)):
        with torch.autocast("cpu", half):
            loss = model(hsi, aux, valid=valid, mask=mask).loss
        loss.backward()
    with torch.autocast("cpu", half), torch.no_grad():
        model.hsi_encoder()(hsi)


def run_case(case, types):
    results(case, case.call, case.inputs(types), types)


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_cases_that_are_executed_have_the_dtypes_of_a_step(launched, half):
    tested = set()
    for case in CASES:
        if case.small:  # the emulator and the interpreter execute these
            tested |= launched(run_case, case, TYPES[f"mixed {half}"])
    for options in MODELS:
        made = launched(train, options, TYPES[half].dtype)
        assert len(made) > 10
        assert_covered(made, tested)


def test_the_dtypes_of_a_step_in_bfloat16_are_compiled_ahead_of_time(launched):
    recorder = Recorder("sm90")
    with execute_by(recorder):
        for case in COMPILED.values():
            case(torch.bfloat16)
    compiled = {dtypes_of(launch) for launch, _ in recorder.launches.values()}
    for options in MODELS:
        assert_covered(launched(train, options, torch.bfloat16), compiled)


def assert_covered(made, known):
    assert "\n".join(map(str, sorted(made - known, key=str))) == ""
