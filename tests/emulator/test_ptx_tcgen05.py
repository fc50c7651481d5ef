"""`tcgen05` and `mbarrier` on the emulator: programs by hand and by Triton, whole and broken on purpose."""

import re

import numpy as np
import pytest
import torch
import triton

from tests.emulator import kernels
from tests.emulator.gpu import BLACKWELL
from tests.emulator.programs import core_matrices, run_program
from tests.emulator.ptx import Deadlock, EmulatorError, Misaligned, OutOfBounds, Race, UnknownInstruction, execute

compiles = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET: nothing is compiled")

# A is at 0, 2048 bytes, and B at 2048: core matrices 128 bytes apart along the sum, 256 bytes along the rows. An
# address in tensor memory comes to 4096, the mbarrier is at 4104.
DESCRIPTOR = 1 << 46 | 128 >> 4 << 16 | 256 >> 4 << 32
FORM = 64 >> 4 << 24 | 8 >> 3 << 17 | 1 << 4  # 64 by 8, float16 to float32
PRODUCT = f"tcgen05.mma.cta_group::1.kind::f16 [%d], %w1, %w2, {FORM}, "
WAIT = "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [4104], 0; @!done bra.uni again; }"
BODY = f"""
    .reg .pred %q<3>;
    .reg .b32 %x<5>;
    .reg .b32 %y<8>;
    .reg .b32 %d;
    .reg .b32 %e;
    .reg .b64 %w<3>;
    mad.wide.u32 %w0, %t, 16, %p;
    shl.b32 %x4, %t, 4;
    ld.global.v4.b32 {{%x0, %x1, %x2, %x3}}, [%w0];
    st.shared.v4.b32 [%x4], {{%x0, %x1, %x2, %x3}};
    setp.lt.u32 %q0, %t, 16;
    @%q0 ld.global.v4.b32 {{%x0, %x1, %x2, %x3}}, [%w0+2048];
    @%q0 st.shared.v4.b32 [%x4+2048], {{%x0, %x1, %x2, %x3}};
    setp.lt.u32 %q0, %t, 32;
    @%q0 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [4096], 32;
    elect.sync %x0|%q1, -1;
    and.pred %q1, %q0, %q1;
    @%q1 mbarrier.init.shared::cta.b64 [4104], 1;
    bar.sync 0;
    ld.shared.b32 %d, [4096];
    and.b32 %e, %t, 96;
    shl.b32 %e, %e, 16;
    add.u32 %e, %d, %e;
    mov.b32 %x0, 0f3F800000;
    tcgen05.st.sync.aligned.32x32b.x8.b32 [%e], {{%x0, %x0, %x0, %x0, %x0, %x0, %x0, %x0}};
    tcgen05.wait::st.sync.aligned;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    mov.b64 %w1, {DESCRIPTOR};
    mov.b64 %w2, {DESCRIPTOR | 2048 >> 4};
    setp.eq.u32 %q2, 0, 0;
    @%q1 {PRODUCT} %q2;
    @%q1 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [4104];
    {WAIT}
    tcgen05.ld.sync.aligned.32x32b.x8.b32 {{%y0, %y1, %y2, %y3, %y4, %y5, %y6, %y7}}, [%e];
    tcgen05.wait::ld.sync.aligned;
    add.u64 %w0, %w0, %w0;
    sub.u64 %w0, %w0, %p;
    st.global.v4.b32 [%w0+4096], {{%y0, %y1, %y2, %y3}};
    st.global.v4.b32 [%w0+4112], {{%y4, %y5, %y6, %y7}};
    bar.sync 0;
    @%q0 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    @%q0 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %d, 32;
"""


def multiply(change=lambda body: body, blocks=1) -> np.ndarray:
    """Run the program and return the product that it makes, [64, 8]."""
    memory = np.zeros(3072, np.float32)
    a, b = operands()
    memory.view(np.uint8)[: 2048 + 256] = np.concatenate([core_matrices(a), core_matrices(b)])
    run_program(change(BODY), memory, blocks=blocks)
    lanes = memory[1024 : 1024 + 1024].reshape(4, 2, 16, 8)  # the upper half of each warp's lanes has no rows
    return lanes[:, 0].reshape(64, 8)


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
    assert (multiply(replaced("setp.eq.u32 %q2", "setp.ne.u32 %q2")) == exact).all()
    assert (
        multiply(replaced("@%q1 tcgen05.commit", f"@%q1 {PRODUCT} %q2; @%q1 tcgen05.commit")) == 2 * exact + 1
    ).all()


def test_the_left_operand_may_be_in_tensor_memory():
    """Two numbers in a word: row i is lane 32 (i / 16) + i % 16, column pair j is column 8 + j."""
    a, b = operands()
    loads = """.reg .b32 %l; .reg .b32 %g; .reg .b32 %a<8>; and.b32 %l, %t, 15; shr.u32 %g, %l, 3; shl.b32 %g, %g, 8;
    and.b32 %l, %l, 7; shl.b32 %l, %l, 4; add.u32 %l, %l, %g; shr.u32 %g, %t, 5; shl.b32 %g, %g, 9; add.u32 %l, %l, %g;
    ld.shared.v4.b32 {%a0, %a1, %a2, %a3}, [%l]; ld.shared.v4.b32 {%a4, %a5, %a6, %a7}, [%l+128];
    tcgen05.st.sync.aligned.32x32b.x8.b32 [%e+8], {%a0, %a1, %a2, %a3, %a4, %a5, %a6, %a7}; tcgen05.wait::st"""

    def change(body: str) -> str:
        return body.replace("tcgen05.wait::st", loads).replace("[%d], %w1", "[%d], [%d+8]")

    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    assert (multiply(change) == exact + 1).all()
    write = "@%q0 tcgen05.st.sync.aligned.32x32b.x1.b32 [%e+8], {%x0}; { .reg .pred done"
    with pytest.raises(Race, match="a matrix product uses that was not waited for"):
        multiply(lambda body: change(body).replace("{ .reg .pred done", write))


def test_a_load_may_take_two_halves_of_columns():
    a, b = operands()
    exact = a.astype(np.float64) @ b.T.astype(np.float64) + 1
    load = "tcgen05.ld.sync.aligned.16x32bx2.x4.b32 {%y0, %y1, %y2, %y3}, [%e], 4;"
    store = "st.global.v4.b32 [%w0+4112], {%y0, %y1, %y2, %y3};"

    def change(body: str) -> str:
        return re.sub(r"st\.global\.v4\.b32 \[%w0\+4112\][^;]*;", store, re.sub(r"tcgen05\.ld[^;]*;", load, body))

    memory = np.zeros(3072, np.float32)
    memory.view(np.uint8)[: 2048 + 256] = np.concatenate([core_matrices(each) for each in operands()])
    run_program(change(BODY), memory)
    halves = memory[1024:2048].reshape(4, 2, 16, 8)[..., :4]
    assert (halves.transpose(0, 2, 1, 3).reshape(64, 8) == exact).all()


LOAD = "tcgen05.ld.sync.aligned.32x32b.x1.b32 {%y0}, [%e]; tcgen05.wait::ld.sync.aligned;"


@pytest.mark.parametrize(
    ("old", "new", "error", "why"),
    [
        ("fence.proxy.async.shared::cta;", "", Race, "without a proxy fence between"),
        (WAIT, "", Race, "a matrix product uses that was not waited for"),
        (WAIT, WAIT.replace(", 0;", ", 1;"), Deadlock, "never completes"),
        ("[4104], 1;", "[4104], 2;", Deadlock, "never completes"),
        ("[4104], 1;", "[4104], 0;", EmulatorError, "0 arrivals"),
        ("[4104], 1;", "[4100], 1;", Misaligned, "0x1004"),
        ("bar.sync 0;", "@%q1 mbarrier.init.shared::cta.b64 [4104], 1; bar.sync 0;", EmulatorError, "already"),
        ("@%q1 tcgen05.commit", "@%q1 st.shared.b32 [4104], %x0; @%q1 tcgen05.commit", EmulatorError, "something else"),
        ("tcgen05.wait::ld.sync.aligned;", "", Race, "its tcgen05.ld was not waited for"),
        ("tcgen05.wait::st.sync.aligned;", "", Race, "tcgen05.st uses, which was not waited for"),
        ("@%q1 tcgen05.commit", "st.shared.b32 [%x4], %x0; @%q1 tcgen05.commit", Race, "a matrix product reads"),
        (WAIT, f"{LOAD} {WAIT}", Race, "a matrix product uses that was not waited for"),
        (WAIT, f"@%q1 mbarrier.inval.shared::cta.b64 [4104]; {WAIT}", Race, "it tracks was not waited for"),
        ("@%q0 tcgen05.dealloc", "@%q2 bra $end; @%q0 tcgen05.dealloc", EmulatorError, "without tcgen05.dealloc"),
        ("b32 %d, 32;", "b32 %d, 64;", EmulatorError, "no allocation"),
        ("[4096], 32;", "[4096], 48;", EmulatorError, "a power of two"),
        ("[4096], 32;", "[4096], 512; @%q0 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [4100], 32;",
         EmulatorError, "no 32 columns are free"),
        ("@%q0 tcgen05.alloc", "@%q0 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned; @%q0 tcgen05.alloc",
         EmulatorError, "given up its permit"),
        ("@%q0 tcgen05.alloc", "tcgen05.alloc", EmulatorError, "several warps"),
        ("@%q1 tcgen05.mma", "@%q0 tcgen05.mma", EmulatorError, "several threads"),
        ("ld.shared.b32 %d, [4096];", "mov.b32 %d, 0;", OutOfBounds, "not allocated"),
        ("and.b32 %e, %t, 96;", "mov.b32 %e, 0;", OutOfBounds, "another warp has to access"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_seen(old, new, error, why):
    body = replaced(old, new)
    with pytest.raises(error, match=why):
        multiply(lambda text: body(text) + "$end:")


@pytest.mark.parametrize("number", range(2))
def test_a_barrier_that_is_missing_is_seen(number):
    """The last one lies between loads and the end of the allocation, which is no access."""
    barriers = list(re.finditer(r"bar\.sync 0;", BODY))
    with pytest.raises(Race, match="without a barrier between"):
        multiply(lambda body: body[: barriers[number].start()] + body[barriers[number].end() :])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (str(FORM), str(FORM | 1 << 13)),
        (str(FORM), str(FORM & ~(1 << 4))),
        (str(DESCRIPTOR), str(DESCRIPTOR | 1 << 52)),
        (str(DESCRIPTOR), str(DESCRIPTOR & ~(1 << 46))),
        ("kind::f16", "kind::i8"),
        ("32x32b.x8", "32x32b.x4"),
        ("cta_group::1.kind", "cta_group::2.kind"),
        ("[4104], 0;", "[4104], 0, 100;"),
        ("mbarrier.try_wait", "mbarrier.test_wait"),
    ],
)
def test_forms_that_are_not_known_are_refused(old, new):
    with pytest.raises(UnknownInstruction):
        multiply(replaced(old, new))


ARRIVALS = """
    .reg .pred %q<2>;
    .reg .b32 %x;
    .reg .b64 %w;
    setp.eq.u32 %q0, %t, 0;
    @%q0 mbarrier.init.shared::cta.b64 [64], 64;
    mov.b32 %x, 0;
    bar.sync 0;
    setp.ge.u32 %q1, %t, 64;
    @%q1 bra $arrive;
    { .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [64], 0; @!done bra.uni again; }
    ld.shared.b32 %x, [68];
    bra.uni $out;
$arrive:
    mbarrier.arrive.shared::cta.b64 _, [64];
$out:
    mad.wide.u32 %w, %t, 4, %p;
    mov.b32 %x, %t;
    st.global.b32 [%w], %x;
"""


def test_threads_wait_until_all_have_arrived():
    """Those that wait come first in the program: the others run while they are parked."""
    memory = np.zeros(128, np.uint32)
    run_program(ARRIVALS, memory)
    assert memory.tolist() == list(range(128))
    with pytest.raises(Deadlock, match=r"thread 0 of block .* never completes"):
        run_program(ARRIVALS.replace("[64], 64;", "[64], 65;"), memory)
    with pytest.raises(EmulatorError, match="more arrivals"):
        run_program(ARRIVALS.replace("[64], 64;", "[64], 63;").replace("_, [64];", "_, [64], 2;"), memory)
    with pytest.raises(Race, match="without a barrier between"):
        run_program(ARRIVALS.replace("bar.sync 0;", ""), memory)


def test_one_thread_of_each_warp_is_elected():
    memory = np.zeros(128, np.uint32)
    body = ".reg .pred %q; .reg .b32 %x; .reg .b64 %w; elect.sync %x|%q, -1; selp.b32 %x, 1, %x, %q;"
    run_program(body + "mad.wide.u32 %w, %t, 4, %p; st.global.b32 [%w], %x;", memory)
    assert memory.tolist() == [int(thread % 32 == 0) for thread in range(128)]


def test_names_in_braces_are_those_of_their_block():
    memory = np.zeros(32, np.uint32)
    count = "{ .reg .b32 left; mov.b32 left, %s; again: add.u32 %%x, %%x, 1; sub.u32 left, left, 1; %s }"
    again = "setp.ne.u32 %q, left, 0; @%q bra again;"
    body = ".reg .pred %q; .reg .b32 %x; .reg .b64 %w; mov.b32 %x, 0;" + count % (3, again) + count % (2, again)
    run_program(body + "mad.wide.u32 %w, %t, 4, %p; st.global.b32 [%w], %x;", memory, threads=32)
    assert memory.tolist() == [5] * 32


def product(a, b, *, blocks, warps=4, stages=3, mutate=None) -> torch.Tensor:
    """Multiply by Triton's code for sm_100."""
    out = torch.full((a.shape[0], b.shape[1]), float("nan"))
    arguments = {"a_ptr": a, "b_ptr": b, "out_ptr": out, "ids_ptr": torch.arange(len(a)), "M": len(a), "N": b.shape[1]}
    arguments |= dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True))
    arguments |= {"K": a.shape[1], "PRECISION": "tf32x3", "STAGES": stages}
    grid = (-(-len(a) // blocks[0]), -(-b.shape[1] // blocks[1]))
    options = {"target": "sm100", "num_warps": warps, "num_stages": stages, "mutate": mutate}
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
        (torch.bfloat16, (128, 32, 64), 8),  # of 128
        (torch.float16, (128, 64, 64), 4),
        (torch.float32, (64, 32, 32), 4),  # the left operand in tensor memory
    ],
)
def test_a_compiled_product_equals_torch(dtype, blocks, warps):
    a, b = torch.randn(70, 144).to(dtype), torch.randn(144, 72).to(dtype)
    seen = []
    out = product(a, b, blocks=blocks, warps=warps, mutate=lambda ptx: (seen.append(ptx), ptx + "// as it is")[1])
    assert "tcgen05.mma" in seen[0]
    assert is_product(out, a, b)


@compiles
@pytest.mark.parametrize("mutation", BLACKWELL)
def test_a_broken_product_is_found(mutation):
    a, b = torch.randn(70, 144).half(), torch.randn(144, 72).half()
    with pytest.raises((EmulatorError, AssertionError)):
        assert is_product(product(a, b, blocks=(64, 32, 64), mutate=BLACKWELL[mutation]), a, b)
