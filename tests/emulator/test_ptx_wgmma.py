"""`wgmma` on the emulator: programs by hand and by Triton, against numpy and torch, whole and broken on purpose."""

import re

import numpy as np
import pytest
import torch
import triton

from tests.emulator import kernels
from tests.emulator.gpu import HOPPER
from tests.emulator.programs import core_matrices, run_program
from tests.emulator.ptx import Divergence, EmulatorError, OutOfBounds, Race, UnknownInstruction, execute
from tests.emulator.ptx.matrix_descriptors import Layout, layout_of, unit_offsets

compiles = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET: nothing is compiled")

# A is at 0, 2048 bytes, and B at 2048: core matrices 128 bytes apart along the sum, 256 bytes along the rows.
DESCRIPTOR = 128 >> 4 << 16 | 256 >> 4 << 32
PRODUCT = "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16"
WIDER = "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%d0,%d1,%d2,%d3,%x0,%x1,%x2,%x3}, %w1, %w2, 1, 1, 1, 0, 0;"
BODY = f"""
    .reg .pred %q;
    .reg .b32 %x<5>;
    .reg .b32 %d<4>;
    .reg .b64 %w<3>;
    mad.wide.u32 %w0, %t, 16, %p;
    shl.b32 %x4, %t, 4;
    ld.global.v4.b32 {{%x0, %x1, %x2, %x3}}, [%w0];
    st.shared.v4.b32 [%x4], {{%x0, %x1, %x2, %x3}};
    setp.lt.u32 %q, %t, 16;
    @%q ld.global.v4.b32 {{%x0, %x1, %x2, %x3}}, [%w0+2048];
    @%q st.shared.v4.b32 [%x4+2048], {{%x0, %x1, %x2, %x3}};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.b64 %w1, {DESCRIPTOR};
    mov.b64 %w2, {DESCRIPTOR | 2048 >> 4};
    mov.b32 %d0, 0f3F800000;
    mov.b32 %d1, %d0;
    mov.b32 %d2, %d0;
    mov.b32 %d3, %d0;
    wgmma.fence.sync.aligned;
    {PRODUCT} {{%d0,%d1,%d2,%d3}}, %w1, %w2, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    st.global.v4.b32 [%w0+4096], {{%d0, %d1, %d2, %d3}};
"""


def multiply(change=lambda body: body, blocks=1) -> np.ndarray:
    """Run the program and return the product that it makes, [64, 8]."""
    memory = np.zeros(2048, np.float32)
    a, b = operands()
    memory.view(np.uint8)[: 2048 + 256] = np.concatenate([core_matrices(a), core_matrices(b)])
    body = change(BODY)
    run_program(body, memory, blocks=blocks)
    registers = memory[1024 : 1024 + 512].reshape(4, 8, 4, 2, 2)  # warp, g, t, h, c
    return registers.transpose(0, 3, 1, 2, 4).reshape(64, 8)


def operands() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.integers(-8, 8, (64, 16)).astype(np.float16), random.integers(-8, 8, (8, 16)).astype(np.float16)


def replaced(old: str, new: str):
    def change(body: str) -> str:
        assert old in body
        return body.replace(old, new, 1)

    return change


def test_a_product_equals_numpy():
    a, b = operands()
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    assert (multiply() == exact + 1).all()
    assert (multiply(blocks=3) == exact + 1).all()
    assert (multiply(replaced("%w2, 1, 1, 1", "%w2, 0, 1, 1")) == exact).all()
    assert (multiply(replaced("%w2, 1, 1, 1", "%w2, 1, -1, 1")) == 1 - exact).all()
    twice = f"{PRODUCT} {{%d0,%d1,%d2,%d3}}, %w1, %w2, 1, 1, 1, 0, 0; wgmma.commit"
    assert (multiply(replaced("wgmma.commit", twice)) == 2 * exact + 1).all()


def test_the_left_operand_may_be_in_registers():
    """As `mma` has it: row g, columns 2 t and 2 t + 1 of the first register, in shared memory at 16 g + 4 t."""
    a, b = operands()
    loads = ".reg .b32 %l; .reg .b32 %g; .reg .b32 %a<4>; and.b32 %l, %t, 31; shl.b32 %l, %l, 2; shr.u32 %g, %t, 5;"
    loads += "shl.b32 %g, %g, 9; add.u32 %l, %l, %g;"
    for register, offset in enumerate((0, 256, 128, 384)):  # upper and lower rows, then the same of columns 8 to 15
        loads += f"ld.shared.b32 %a{register}, [%l+{offset}];"

    def change(body: str) -> str:
        body = body.replace("mov.b64 %w1", f"{loads} mov.b64 %w1")
        return body.replace("%w1, %w2, 1, 1, 1, 0, 0", "{%a0,%a1,%a2,%a3}, %w2, 1, 1, 1, 0")

    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    assert (multiply(change) == exact + 1).all()
    # They are read when the product begins: what happens to them then is nobody's business.
    late = replaced("wgmma.commit", "mov.b32 %a0, 0; wgmma.commit")
    assert (multiply(lambda body: late(change(body))) == exact + 1).all()


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("fence.proxy.async.shared::cta;", "", "without a proxy fence between"),
        ("bar.sync 0;", "", "without a barrier between"),
        ("wgmma.fence.sync.aligned;", "", "no wgmma.fence"),
        ("wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned; add.f32 %d2, %d2, %d2;", "no wgmma.fence"),
        ("wgmma.commit_group.sync.aligned;", "", "its wgmma was not waited for"),
        ("wgmma.wait_group.sync.aligned 0;", "", "its wgmma was not waited for"),
        ("wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;", "its wgmma was not waited for"),
        ("wgmma.commit", "mov.b32 %d2, 0; wgmma.commit", "its wgmma was not waited for"),
        ("wgmma.commit", "mov.b32 %x0, %d2; wgmma.commit", "its wgmma was not waited for"),
        ("wgmma.commit", f"{WIDER} wgmma.commit", "its wgmma was not waited for"),
        ("wgmma.commit", "st.shared.b32 [%x4], %x0; wgmma.commit", "a matrix product reads that was not waited for"),
        ("wgmma.commit", "ld.shared.b32 %x0, [%x4]; bar.sync 0; st.shared.b32 [%x4], %x0; wgmma.commit",
         "a matrix product reads that was not waited for"),
        ("st.global.v4.b32 [%w0+4096]", "st.shared.b32 [%x4], %x0; st.global.v4.b32 [%w0+4096]", "without a barrier"),
        ("fence.proxy.async.shared::cta;", "cp.async.ca.shared.global [%x4], [%w0], 16; fence.proxy.async.shared::cta;",
         "cp.async has not landed yet"),
    ],
)  # fmt: skip
def test_what_is_missing_is_seen(old, new, why):
    with pytest.raises(Race, match=why):
        multiply(replaced(old, new))


@pytest.mark.parametrize("fence", ["fence.proxy.async.shared::cta; bar.sync 0;", "bar.sync 0; fence.proxy.async;"])
def test_a_proxy_fence_may_lie_before_or_behind_the_barrier(fence):
    multiply(lambda body: re.sub(r"fence\.proxy\.async\.shared::cta;\s*bar\.sync 0;", fence, body))


def test_a_fence_of_another_warp_does_not_help():
    only = "setp.lt.u32 %q, %t, 32; @%q fence.proxy.async.shared::cta;"
    with pytest.raises(Race, match="without a proxy fence"):
        multiply(replaced("fence.proxy.async.shared::cta;", only))
    # Behind a barrier it knows what all warps wrote, and tells it at the next one.
    multiply(replaced("fence.proxy.async.shared::cta;", f"bar.sync 0; {only}"))


def test_copies_need_no_fence():
    """The compiler puts them anywhere; that the first product has a fence before it remains."""
    multiply(replaced("wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned; mov.b32 %d2, %d0;"))


def test_a_part_of_a_warpgroup_is_seen():
    part = "setp.lt.u32 %q, %t, 64; @%q wgmma.commit_group"
    with pytest.raises(Divergence, match="warpgroup"):
        multiply(replaced("wgmma.commit_group", part))
    with pytest.raises(Divergence, match="different descriptors"):
        multiply(replaced("wgmma.fence", "cvt.u64.u32 %w1, %t; wgmma.fence"))


def test_shared_memory_ends_somewhere():
    with pytest.raises(OutOfBounds, match="8192 bytes of shared memory"):
        multiply(replaced(str(DESCRIPTOR | 2048 >> 4), str(DESCRIPTOR | 8192 >> 4)))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (PRODUCT, PRODUCT.replace(".f32.f16", ".f16.f16")),
        (PRODUCT, PRODUCT.replace("k16", "k8")),
        ("1, 1, 1, 0, 0;", "1, 1, 1;"),
        ("{%d0,%d1,%d2,%d3}, %w1", "{%d0,%d1}, %w1"),
        ("1, 1, 1, 0, 0;", "1, 2, 1, 0, 0;"),
        (str(DESCRIPTOR), str(DESCRIPTOR | 1 << 49)),
    ],
)
def test_forms_that_are_not_known_are_refused(old, new):
    with pytest.raises(UnknownInstruction):
        multiply(replaced(old, new))


def test_descriptors_say_where_units_are():
    assert layout_of(1 << 62 | 64 << 32 | 32 << 16 | 5, blackwell=False) == Layout(512, 1024, 7)
    assert layout_of(4 << 61 | 1 << 46 | 64 << 32 | 32 << 16 | 5, blackwell=True) == Layout(512, 1024, 3)
    assert layout_of(1 << 62, blackwell=True) is None  # bit 46 is not set
    assert layout_of(1 << 61 | 1 << 46, blackwell=True) is None  # swizzles of 32 bytes within 128
    start = np.array([0, 4096])
    # Lines of 128 bytes: unit u of row r is unit u ^ r % 8 of its line.
    offsets = unit_offsets(start, Layout(0, 1024, 7), rows=16, inner=64, size=2, transposed=False)
    expected = [[r * 128 + (u ^ r % 8) * 16 for u in range(8)] for r in range(16)]
    assert offsets.tolist() == [expected, (np.array(expected) + 4096).tolist()]
    # Lines of 64 bytes: two rows share what is swizzled alike.
    offsets = unit_offsets(start[:1], Layout(0, 512, 3), rows=8, inner=32, size=2, transposed=False)
    assert offsets[0].tolist() == [[r * 64 + (u ^ r // 2 % 4) * 16 for u in range(4)] for r in range(8)]
    # Transposed: 64 rows in a line, a line for each k.
    offsets = unit_offsets(start[:1], Layout(2048, 1024, 7), rows=128, inner=16, size=2, transposed=True)
    expected = [[u // 8 * 2048 + k * 128 + (u % 8 ^ k % 8) * 16 for k in range(16)] for u in range(16)]
    assert offsets[0].tolist() == expected


def product(a, b, *, blocks, warps=4, stages=3, mutate=None) -> torch.Tensor:
    """Multiply by Triton's code for sm_90."""
    out = torch.full((a.shape[0], b.shape[1]), float("nan"))
    arguments = {"a_ptr": a, "b_ptr": b, "out_ptr": out, "ids_ptr": torch.arange(len(a)), "M": len(a), "N": b.shape[1]}
    arguments |= dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True))
    arguments |= {"K": a.shape[1], "PRECISION": "tf32x3", "STAGES": stages}
    grid = (-(-len(a) // blocks[0]), -(-b.shape[1] // blocks[1]))
    options = {"target": "sm90", "num_warps": warps, "num_stages": stages, "mutate": mutate}
    execute(kernels.gather_matmul, grid, arguments, **options)
    return out


def is_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.double(), b.double()
    return bool(((out - a @ b).abs() <= a.shape[1] * 2.0**-22 * (a.abs() @ b.abs())).all())


@compiles
@pytest.mark.parametrize(
    ("dtype", "blocks", "warps"),
    [
        (torch.bfloat16, (64, 16, 16), 4),  # lines of 32 bytes
        (torch.float16, (64, 64, 32), 4),  # of 64
        (torch.bfloat16, (128, 32, 64), 8),  # of 128, two warpgroups
        (torch.float16, (128, 64, 64), 4),
        (torch.float32, (64, 32, 32), 4),  # the left operand in registers
    ],
)
def test_a_compiled_product_equals_torch(dtype, blocks, warps):
    a, b = torch.randn(70, 144).to(dtype), torch.randn(144, 72).to(dtype)
    seen = []
    out = product(a, b, blocks=blocks, warps=warps, mutate=lambda ptx: (seen.append(ptx), ptx + "// as it is")[1])
    assert "wgmma.mma_async" in seen[0]
    assert is_product(out, a, b)


@compiles
@pytest.mark.parametrize("mutation", HOPPER)
def test_a_broken_product_is_found(mutation):
    a, b = torch.randn(70, 144).half(), torch.randn(144, 72).half()
    with pytest.raises((EmulatorError, AssertionError)):
        assert is_product(product(a, b, blocks=(64, 32, 64), mutate=HOPPER[mutation]), a, b)


@compiles
def test_every_barrier_that_is_dropped_is_found():
    a, b = torch.randn(64, 144).half(), torch.randn(144, 32).half()
    seen = []
    product(a, b, blocks=(64, 32, 32), mutate=lambda ptx: (seen.append(ptx), ptx + "//")[1])
    barriers = list(re.finditer(r"bar\.sync\s+0;", seen[0]))
    found = []
    for barrier in barriers:
        try:
            ptx = seen[0][: barrier.start()] + seen[0][barrier.end() :]
            found.append(not is_product(product(a, b, blocks=(64, 32, 32), mutate=lambda _, ptx=ptx: ptx), a, b))
        except Race:
            found.append(True)
    assert found.count(False) <= 1 < len(found)  # the first lies between copies to different places
