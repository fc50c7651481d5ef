"""The report of what compiled kernels need, and what makes it fail."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("TRITON_INTERPRET is set: nothing can be compiled", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")

import mmmae
from mmmae_kernels import counting, shapes, use_backend
from mmmae_kernels.aot import rows
from mmmae_kernels.aot.__main__ import main
from mmmae_kernels.aot.assembly import load_bytes, matrix_instructions
from mmmae_kernels.aot.cases import CASES
from mmmae_kernels.aot.occupancy import MULTIPROCESSORS, occupancy, resident_programs, waves
from mmmae_kernels.aot.rows import HEADS, Recorder, faults_of
from mmmae_kernels.gpu.compilation import compile_kernel, gpu_target
from mmmae_kernels.gpu.config import SHARED_MEMORY
from mmmae_kernels.gpu.executors import execute_by

RIGHT = {
    "op": "patch_embed",
    "kernel": "patch_embed_forward",
    "target": "sm86",
    "dtype": "bf16",
    "config": "M64",
    "registers": 128,
    "spills": 0,
    "scalar_spills": 0,
    "shared": 99 << 10,
    "matrix_instructions": 16,
    "load_bytes": 16,
    "note": "",
}


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({}, None),
        ({"spills": 8}, "spills 8 bytes"),
        ({"scalar_spills": 6, "target": "gfx1100", "shared": 0}, "spills 6 scalar registers"),
        ({"shared": (99 << 10) + 1}, "asks for 101377 bytes of shared memory, the limit is 101376"),
        ({"matrix_instructions": 0}, "has no matrix instructions"),
        ({"matrix_instructions": 0, "target": "gfx1100", "shared": 0}, "has no matrix instructions"),
        ({"matrix_instructions": 0, "target": "gfx1100", "shared": 0, "dtype": "fp32"}, None),
        ({"load_bytes": 8}, "loads its data in pieces of 8 bytes"),
        ({"load_bytes": 8, "note": "lines of 14 bytes"}, None),
        ({"matrix_instructions": 0, "kernel": "gelu_backward"}, None),
    ],
)
def test_what_must_not_be_is_a_fault(wrong, complaint):
    faults = faults_of({**RIGHT, **wrong})
    assert len(faults) == (complaint is not None)
    assert complaint is None or complaint in faults[0]


def test_one_list_of_rows_is_printed_and_no_fault_is_status_0(tmp_path):
    command = [
        sys.executable,
        "-m",
        "mmmae_kernels.aot",
        "--op",
        "add_layer_norm",
        "--target",
        "sm80",
        "--dtype",
        "fp16",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    printed = json.loads(done.stdout)
    assert {row["kernel"] for row in printed} == {"add_layer_norm_forward", "add_layer_norm_backward"}
    assert all(set(HEADS) == set(row) for row in printed)
    assert all(row["load_bytes"] == 16 and row["bytes"] > 0 and row["flops"] > 0 for row in printed)


def test_a_fault_is_status_1(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules["mmmae_kernels.aot.rows"].SHARED_MEMORY, "sm80", 1)
    assert main(["--op", "add_layer_norm", "--target", "sm80", "--dtype", "fp32"]) == 1
    captured = capsys.readouterr()
    assert "the limit is 1" in captured.err
    assert captured.out.splitlines()[0].split() == list(HEADS)


@pytest.mark.parametrize("arguments", [["--op", "conv"], ["--target", "sm70"], ["--dtype", "fp64"]])
def test_a_wrong_option_is_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["sm", "cuda90", "90", "gtx1080"])
def test_an_unknown_architecture_is_refused(target):
    with pytest.raises(ValueError, match="expected an architecture"):
        gpu_target(target)


@pytest.mark.parametrize(
    ("asm", "width"),
    [
        ("ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", 16),
        ("ld.global.L1::evict_first.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];", 8),
        ("@%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", 2),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", 16),
        ("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;", 4),
        # The loop decides, not what stands before it.
        ("ld.global.v4.b32 {a}, [b];\n$L1:\nld.global.b32 { %r1 }, [ %rd1 ];\n@%p1 bra $L1;\n", 4),
        # Most of the data, not most of the loads.
        (
            "$L1:\n"
            + "ld.global.b64 { %rd1 }, [ %rd1 ];\n" * 3
            + "ld.global.v4.b32 {a}, [b];\n" * 2
            + "bra.uni $L1;\n",
            16,
        ),
        ("st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };", 0),
    ],
)
def test_the_width_of_loads_is_read_from_ptx(asm, width):
    assert load_bytes({"ptx": asm}) == width


@pytest.mark.parametrize(
    ("asm", "width"),
    [
        ("\tbuffer_load_dwordx4 v[2:5], v1, s[0:3], 0 offen", 16),
        ("\tglobal_load_dword v2, v1, s[0:1]", 4),
        ("\tbuffer_load_b128 v[2:5], v1, s[0:3], 0 offen", 16),
        ("\tglobal_load_u16 v1, v2, s[0:1]", 2),
        ("\tbuffer_load_ubyte v1, v2, s[0:3], 0", 1),
        (".LBB0_2:\n\tbuffer_load_dwordx2 v[2:3], v1, s[0:3], 0\n\ts_cbranch_scc1 .LBB0_2\n", 8),
        ("\ts_load_dwordx4 s[0:3], s[4:5], 0x0", 0),
    ],
)
def test_the_width_of_loads_is_read_from_amd_code(asm, width):
    assert load_bytes({"amdgcn": asm}) == width


def test_matrix_instructions_are_counted():
    assert matrix_instructions({"ptx": "mma.sync.aligned x; wgmma.mma_async y; tcgen05.mma.cta z; fma.rn.f32 a;"}) == 3
    assert matrix_instructions({"amdgcn": "v_mfma_f32_16x16x16_f16 a\nv_wmma_f32_16x16x16_bf16 b\nv_fma_f32 c"}) == 2


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        # Of NVIDIA's occupancy calculator: by warps, by registers (a warp takes 40 or 256 for each thread), by shared
        # memory and by programs.
        ("sm80", 32, 0, 4, 16),
        ("sm80", 33, 0, 4, 12),
        ("sm90", 255, 0, 8, 1),
        ("sm86", 32, 40 << 10, 4, 2),
        ("sm90", 32, 113 << 10, 4, 2),
        ("sm86", 16, 0, 1, 16),
        ("sm89", 16, 0, 1, 24),
        ("sm120", 40, 0, 8, 6),
        ("gfx90a", 64, 0, 4, 8),
        ("gfx942", 65, 0, 4, 7),
        ("gfx942", 129, 0, 4, 3),
        ("gfx90a", 32, 24 << 10, 4, 2),
        ("gfx942", 32, 0, 1, 32),  # one wave waits at no barrier
        ("gfx1100", 96, 0, 4, 16),
        ("gfx1100", 97, 0, 4, 12),
        ("gfx1100", 32, 32 << 10, 4, 4),
    ],
)
def test_programs_that_a_multiprocessor_holds(target, registers, shared, warps, programs):
    assert resident_programs(target, registers, shared, warps) == programs


def test_occupancy_and_waves_are_parts_of_what_a_gpu_holds():
    assert occupancy("sm90", 4, 8) == 0.5
    assert waves("sm90", 4, 132) == 0.25
    assert waves("gfx942", 1, 456) == 1.5


def test_every_architecture_has_a_multiprocessor_with_room_for_the_largest_program():
    assert set(MULTIPROCESSORS) == set(SHARED_MEMORY)
    for target, shared in SHARED_MEMORY.items():
        assert resident_programs(target, 64, shared, 8) >= 1


@pytest.mark.parametrize("target", [target for target in SHARED_MEMORY if target.startswith("gfx")])
def test_registers_leave_room_for_as_many_waves_as_llvm_says(target):
    recorder = Recorder(target)
    with execute_by(recorder):
        CASES["decoder_tokens"](torch.bfloat16)
        CASES["concat_attention"](torch.bfloat16)
    for launch, config in recorder.launches.values():
        code = compile_kernel(launch.kernel, launch.arguments, config, target).asm["amdgcn"]
        registers, by_llvm = (int(re.search(rf"{name}: +(\d+)", code)[1]) for name in (".vgpr_count", "; Occupancy"))
        assert resident_programs(target, registers, 0, 1) // MULTIPROCESSORS[target].schedulers == by_llvm


def test_the_shapes_are_those_of_base():
    config = mmmae.MMMAEConfig.preset("base")
    assert (config.tokens, config.keep, config.dim) == (shapes.TOKENS, shapes.KEEP, shapes.WIDTH)
    assert (config.bands, config.image_size, config.patch) == (shapes.BANDS, shapes.SIZE, shapes.PATCH)
    assert (config.decoder_dim, config.mlp_ratio * config.dim) == (shapes.DECODER_WIDTH, shapes.HIDDEN)


@pytest.mark.usefixtures("on_threads")  # compiling sets how many there are
def test_what_was_read_from_code_is_read_once(monkeypatch):
    arguments = ("sm80", "fp16", ("decoder_tokens",))
    first = rows.compile_rows(arguments)
    monkeypatch.setattr(rows, "registers_and_spills", lambda asm: pytest.fail("read again"))
    assert rows.compile_rows(arguments) == first


def test_every_op_with_triton_kernels_is_compiled():
    import mmmae_kernels

    serving = {
        op for op, answers in mmmae_kernels.explain().items() if answers.get("triton", "").startswith("there is no GPU")
    }
    composed = {"norm_linear", "transformer_block", "conditioning"} & serving  # of other ops' kernels and torch's GEMM
    guided = {"concat_attention"}  # of its backends, which are those of attention, none is Triton: it merges vectors
    assert set(CASES) - guided | composed | {"patchify"} == serving | ({"patchify"} - serving)


def test_the_launches_that_are_counted_are_those_that_are_made():
    """The table of launches against the launcher, for operators that start more than one kernel."""
    x = torch.zeros(2, 3, 64)
    made = {}

    def launches(name, function, *arguments):
        recorder = Counter()
        with execute_by(recorder), use_backend("triton"):
            function(*arguments)
        made[name] = recorder.count, counting.launches_of(name, arguments)

    ops, ids = torch.ops.mmmae, torch.zeros(2, 3, dtype=torch.int64)
    counters = torch.zeros(32, dtype=torch.int32)
    volume, weight = torch.zeros(2, 1, 3, 32, 32), torch.zeros(64, 1, 3, 16, 16)
    launches("mmmae::add_layer_norm", ops.add_layer_norm, x, x, None, x[0, 0], x[0, 0], 1e-6, torch.float32, "triton")
    launches(
        "mmmae::add_layer_norm_backward",
        ops.add_layer_norm_backward,
        x,
        x,
        x,
        x[0, 0],
        None,
        torch.zeros(2, 6),
        counters,
        torch.float32,
        torch.bfloat16,
        "triton",
    )
    launches("mmmae::decoder_tokens", ops.decoder_tokens, x, x[0, 0], ids, x[0], "triton")
    launches("mmmae::decoder_tokens_backward", ops.decoder_tokens_backward, x, ids, 3, "triton")
    launches("mmmae::gelu", ops.gelu, x, x[0, 0], "triton")
    launches("mmmae::gelu_backward", ops.gelu_backward, x.clone(), x, x[0, 0], counters, "triton")
    heads, lse, vectors = torch.zeros(2, 3, 1, 64), torch.zeros(2, 1, 3), torch.zeros(2, 2, 2, 1, 64)
    guided = heads, heads.clone(), lse, vectors, torch.ones(2, 2, dtype=torch.bool)
    launches("mmmae::merge_vectors", ops.merge_vectors, *guided, "triton")
    launches("mmmae::merge_vectors_backward", ops.merge_vectors_backward, heads, *guided, heads.clone(), "triton")
    launches("mmmae::masked_l2_loss", ops.masked_l2_loss, x, x, ids, None, False, True, "triton")
    launches("mmmae::patch_l2_loss", ops.patch_l2_loss, x, volume, weight, None, ids, None, False, True, "triton")
    launches("mmmae::patch_embed", ops.patch_embed, volume, weight, None, ids, None, "triton")
    launches(
        "mmmae::patch_embed_backward",
        ops.patch_embed_backward,
        x,
        volume,
        weight,
        ids,
        [False, True, True, False],
        "triton",
    )
    assert {name: count for name, (count, _) in made.items()} == {name: told for name, (_, told) in made.items()}


class Counter(Recorder):
    """Counts launches for sm80."""

    def __init__(self):
        super().__init__("sm80")
        self.count = 0

    def __call__(self, launch):
        self.count += 1
        return launch.configs[0]
