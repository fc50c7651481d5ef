"""Single PTX instructions against Python's integers and numpy's floats, on values that kernels seldom have."""

import math
import struct

import numpy as np
import pytest
import torch

from tests.emulator.ptx import EmulatorError, UnknownInstruction
from tests.emulator.ptx.executor import Executor
from tests.emulator.ptx.global_memory import GlobalMemory, Segment
from tests.emulator.ptx.program import parse

WORDS = [0, 1, 2, 31, 32, 33, 127, 128, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0x12345678, 0xF0E1D2C3, 7, 64]
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


def run(body: str, *columns: list[int], bits: int = 32, out_bits: int = 32) -> list[int]:
    """Return the values of %o after `body`, for 32 threads with a row of `columns` each in %a, %b and %c."""
    memory = np.zeros((4, 32), np.uint64)
    for column, values in enumerate(columns):
        memory[column] = values
    names = "abc"[: len(columns)]
    loads = "".join(f"ld.global.b{bits} %{name}, [%p+{256 * i}];" for i, name in enumerate(names))
    ptx = f"""
.visible .entry test(
    .param .u64 test_param_0
)
{{
    .reg .pred %q;
    .reg .pred %r;
    .reg .b16 %h<3>;
    .reg .b32 %t;
    .reg .b64 %p;
    .reg .b64 %w;
    .reg .b{bits} %a;
    .reg .b{bits} %b;
    .reg .b{bits} %c;
    .reg .b{out_bits} %o;
    ld.param.b64 %p, [test_param_0];
    mov.u32 %t, %tid.x;
    mad.wide.u32 %p, %t, 8, %p;
    {loads}
    {body}
    st.global.b{out_bits} [%p+768], %o;
    ret;
}}
"""
    program = parse(ptx)
    executor = Executor(program, 32, 1, 1024)
    state = executor.state
    state.parameters["test_param_0"][0] = memory.ctypes.data
    segment = Segment("memory", memory.ctypes.data, memory.nbytes, memory)
    with np.errstate(all="ignore"), state.started([(0, 0, 0)], (1, 1, 1), GlobalMemory([segment], state.faults)):
        executor.run()
    return memory[3].tolist()


def pairs() -> tuple[list[int], list[int]]:
    return WORDS * 2, (WORDS[5:] + WORDS[:5]) + (WORDS[11:] + WORDS[:11])


def signed(value: int, bits: int = 32) -> int:
    return (value + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1)


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def half(bits: int) -> float:
    return float(struct.unpack("<e", struct.pack("<H", bits & 0xFFFF))[0])


INTEGER = {
    "add.s32 %o, %a, %b;": lambda a, b: a + b,
    "sub.s32 %o, %a, %b;": lambda a, b: a - b,
    "mul.lo.s32 %o, %a, %b;": lambda a, b: a * b,
    "mul.hi.u32 %o, %a, %b;": lambda a, b: a * b >> 32,
    "mul.hi.s32 %o, %a, %b;": lambda a, b: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %o, %a, %b, 17;": lambda a, b: a * b + 17,
    "mad.hi.u32 %o, %a, %b, 17;": lambda a, b: (a * b >> 32) + 17,
    "max.s32 %o, %a, %b;": lambda a, b: max(signed(a), signed(b)),
    "min.u32 %o, %a, %b;": min,
    "and.b32 %o, %a, %b;": lambda a, b: a & b,
    "xor.b32 %o, %a, %b;": lambda a, b: a ^ b,
    "not.b32 %o, %a;": lambda a, b: ~a,
    "neg.s32 %o, %a;": lambda a, b: -a,
    "abs.s32 %o, %a;": lambda a, b: abs(signed(a)),
    "shl.b32 %o, %a, %b;": lambda a, b: a << b if b < 32 else 0,
    "shr.u32 %o, %a, %b;": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32 %o, %a, %b;": lambda a, b: signed(a) >> min(b, 31),
    "shr.s32 %o, %a, 3;": lambda a, b: signed(a) >> 3,
    "shf.l.wrap.b32 %o, %a, %b, 7;": lambda a, b: (b << 32 | a) << 7 >> 32,
    "shf.r.wrap.b32 %o, %a, %b, 39;": lambda a, b: (b << 32 | a) >> 7,
    "shf.r.clamp.b32 %o, %a, %b, 39;": lambda a, b: b,
    "bfe.u32 %o, %a, 4, 8;": lambda a, b: a >> 4 & 255,
    "bfe.s32 %o, %a, 4, 8;": lambda a, b: signed(a >> 4 & 255, 8),
    "bfe.u32 %o, %a, 28, 8;": lambda a, b: a >> 28,
    "bfe.s32 %o, %a, 28, 8;": lambda a, b: signed(a) >> 28,
    "bfe.s32 %o, %a, 4, 0;": lambda a, b: 0,
    "bfi.b32 %o, %a, %b, 4, 8;": lambda a, b: b & ~0xFF0 | (a & 255) << 4,
    "prmt.b32 %o, %a, %b, 0x5410U;": lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16,
    "prmt.b32 %o, %a, %b, 0x9080;": lambda a, b: (
        a & 255 | 255 * (a >> 7 & 1) << 8 | (a & 255) << 16 | 255 * (a >> 15 & 1) << 24
    ),
    "lop3.b32 %o, %a, %b, 0x0f0f0f0f, 0xe8;": lambda a, b: a & b | a & 0x0F0F0F0F | b & 0x0F0F0F0F,
    "lop3.b32 %o, %a, %b, %a, 0x96;": lambda a, b: a ^ b ^ a,
    "clz.b32 %o, %a;": lambda a, b: 32 - a.bit_length(),
    "popc.b32 %o, %a;": lambda a, b: a.bit_count(),
    "brev.b32 %o, %a;": lambda a, b: int(f"{a:032b}"[::-1], 2),
    "cvt.s32.s8 %o, %a;": lambda a, b: signed(a, 8),
    "cvt.u32.u8 %o, %a;": lambda a, b: a & 255,
    "cvt.s8.s32 %o, %a;": lambda a, b: signed(a, 8),
    "cvt.sat.s8.s32 %o, %a;": lambda a, b: min(max(signed(a), -128), 127),
    "cvt.sat.u8.s32 %o, %a;": lambda a, b: min(max(signed(a), 0), 255),
    "setp.lt.s32 %q, %a, %b; selp.b32 %o, 1, 2, %q;": lambda a, b: 1 if signed(a) < signed(b) else 2,
    "setp.hi.u32 %q, %a, %b; selp.b32 %o, %a, %b, %q;": max,
    "setp.eq.u32 %r, %a, 1; setp.lt.or.s32 %q, %a, %b, %r; selp.b32 %o, 1, 2, %q;": lambda a, b: (
        1 if signed(a) < signed(b) or a == 1 else 2
    ),
    "mov.b32 {%h0, %h1}, %a; mov.b32 %o, {%h1, %h0};": lambda a, b: a >> 16 | (a & 0xFFFF) << 16,
    "mov.b64 %w, {%a, %b}; shr.u64 %w, %w, 8; cvt.u32.u64 %o, %w;": lambda a, b: (b << 32 | a) >> 8,
    "mov.b32 %o, 3; setp.lt.u32 %q, %a, %b; @!%q mov.b32 %o, %a;": lambda a, b: 3 if a < b else a,
    "add.s16x2 %o, %a, %b;": lambda a, b: (a + b & 0xFFFF) | (a & ~0xFFFF) + (b & ~0xFFFF),
    "max.s16x2 %o, %a, %b;": lambda a, b: (
        max(signed(a, 16), signed(b, 16)) & 0xFFFF | max(signed(a >> 16, 16), signed(b >> 16, 16)) << 16
    ),
    "setp.lt.f16x2 %q|%r, %a, %b; selp.b32 %o, 1, 0, %q; @%r add.s32 %o, %o, 2;": lambda a, b: (
        (half(a) < half(b)) + 2 * (half(a >> 16) < half(b >> 16))
    ),
    "add.cc.u32 %o, %a, %b; madc.hi.u32 %o, %a, 0, 0;": lambda a, b: a + b >> 32,
}


@pytest.mark.parametrize("body", INTEGER)
def test_integers_of_32_bits(body):
    a, b = pairs()
    assert run(body, a, b) == [INTEGER[body](x, y) & MASK32 for x, y in zip(a, b, strict=True)]


LONG = {
    "mul.lo.s64 %o, %a, %b;": lambda a, b: a * b,
    "mul.hi.u64 %o, %a, %b;": lambda a, b: a * b >> 64,
    "mul.hi.s64 %o, %a, %b;": lambda a, b: signed(a, 64) * signed(b, 64) >> 64,
    "div.s64 %o, %a, %b;": lambda a, b: truncated(signed(a, 64), signed(b, 64)),
    "rem.s64 %o, %a, %b;": lambda a, b: signed(a, 64) - signed(b, 64) * truncated(signed(a, 64), signed(b, 64)),
    "div.u64 %o, %a, %b;": lambda a, b: a // b,
    "rem.u64 %o, %a, %b;": lambda a, b: a % b,
    "max.s64 %o, %a, %b;": lambda a, b: max(signed(a, 64), signed(b, 64)),
    "shr.s64 %o, %a, 40;": lambda a, b: signed(a, 64) >> 40,
    "shl.b64 %o, %a, 64;": lambda a, b: 0,
    "cvt.u32.u64 %t, %b; shl.b64 %o, %a, %t;": lambda a, b: a << b if (b := b & MASK32) < 64 else 0,
    "cvt.s64.s32 %o, %a;": lambda a, b: signed(a),
    "cvt.u64.u32 %o, %a;": lambda a, b: a & MASK32,
    "bfe.s64 %o, %a, 8, 40;": lambda a, b: signed(a >> 8, 40),
    "clz.b64 %t, %a; cvt.u64.u32 %o, %t;": lambda a, b: 64 - a.bit_length(),
    "cvt.u32.u64 %t, %a; mul.wide.s32 %o, %t, -3;": lambda a, b: signed(a) * -3,
}


@pytest.mark.parametrize("body", LONG)
def test_integers_of_64_bits(body):
    a = [(x << 32 | y) for x, y in zip(*pairs(), strict=True)]
    b = [(y << 7 | 1) & MASK64 if i % 2 else WORDS[i % 16] or 3 for i, y in enumerate(a)]
    assert run(body, a, b, bits=64, out_bits=64) == [LONG[body](x, y) & MASK64 for x, y in zip(a, b, strict=True)]


FLOATS = [0.0, -0.0, 1.0, -1.5, 0.1, 2.5, 3.5, 1e-40, 65519.0, 65520.0, 1e30, -1e30, 2.0**31, math.inf, -math.inf]
FLOATS += [math.nan, 255.5, 1 + 2.0**-8, 1 + 2.0**-9, 1 + 3 * 2.0**-9, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-23]
FLOATS += [-0.5, 0.5, -2.5, 1e-8, 300.0, -300.0, 4e9, 1e10, -4e9]


def word(value: float) -> int:
    return int.from_bytes(struct.pack("<f", value), "little")


def of_word(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def limited(low: int, high: int, rounded):
    def convert(x: float) -> int:
        if math.isnan(x):
            return 0
        return (low if x < 0 else high) if math.isinf(x) else min(max(rounded(x), low), high)

    return convert


CONVERSIONS = {
    "cvt.rni.s32.f32 %o, %a;": limited(-(2**31), 2**31 - 1, round),
    "cvt.rzi.s32.f32 %o, %a;": limited(-(2**31), 2**31 - 1, math.trunc),
    "cvt.rmi.s32.f32 %o, %a;": limited(-(2**31), 2**31 - 1, math.floor),
    "cvt.rpi.s32.f32 %o, %a;": limited(-(2**31), 2**31 - 1, math.ceil),
    "cvt.rzi.u32.f32 %o, %a;": limited(0, 2**32 - 1, math.trunc),
    "cvt.rzi.u8.f32 %o, %a;": limited(0, 255, math.trunc),
}


@pytest.mark.parametrize("body", CONVERSIONS)
def test_floats_that_do_not_fit_become_the_nearest_integer(body):
    assert run(body, [word(x) for x in FLOATS]) == [CONVERSIONS[body](of_word(word(x))) & MASK32 for x in FLOATS]


def test_floats_are_rounded_to_bfloat16_to_even():
    got = run("cvt.rn.bf16.f32 %h0, %a; mov.b32 %o, {%h0, %h0};", [word(x) for x in FLOATS])
    expected = torch.tensor(FLOATS).bfloat16().view(torch.int16).tolist()
    for bits, value, x in zip(got, expected, FLOATS, strict=True):
        assert bits & 0xFFFF == (0x7FFF if math.isnan(x) else value & 0xFFFF)
    pair = run("cvt.rn.bf16x2.f32 %o, %b, %a;", [word(x) for x in FLOATS], [word(1.0)] * 32)
    assert pair == [0x3F800000 | bits & 0xFFFF for bits in got]


def test_floats_are_rounded_to_tf32_away_from_zero():
    got = run("cvt.rna.tf32.f32 %o, %a;", [word(x) for x in FLOATS])
    for bits, x in zip(got, FLOATS, strict=True):
        assert bits & 0x1FFF == 0
        value = of_word(bits)
        if math.isfinite(x) and abs(x) > 1e-30:
            assert abs(value - x) <= abs(x) * 2.0**-11 + abs(x) * 2.0**-24
        elif not math.isfinite(x):
            assert value == x or math.isnan(value) == math.isnan(x)
    assert of_word(got[FLOATS.index(1 + 2.0**-11)]) == 1 + 2.0**-10


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b and a == a and b == b,
    "neu": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "ltu": lambda a, b: not a >= b,
    "geu": lambda a, b: not a < b,
    "num": lambda a, b: a == a and b == b,
    "nan": lambda a, b: a != a or b != b,
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_with_nan(name):
    other = [*FLOATS[16:], *FLOATS[:16]]
    other[3] = other[20] = math.nan
    other[5] = FLOATS[5]
    columns = [[word(x) for x in values] for values in (FLOATS, other)]
    got = run(f"setp.{name}.f32 %q, %a, %b; selp.b32 %o, 1, 0, %q;", *columns)
    assert got == [int(COMPARISONS[name](a, b)) for a, b in zip(FLOATS, other, strict=True)]


def test_larger_and_smaller_prefer_numbers_unless_told():
    columns = [word(x) for x in FLOATS], [word(1.0)] * 32
    nan = FLOATS.index(math.nan)
    assert run("max.f32 %o, %a, %b;", *columns)[nan] == word(1.0)
    assert math.isnan(of_word(run("max.NaN.f32 %o, %a, %b;", *columns)[nan]))
    assert run("min.f32 %o, %a, %b;", *columns)[:4] == [word(x) for x in (0.0, -0.0, 1.0, -1.5)]


def test_the_smaller_with_the_sign_of_the_product():
    columns = [word(x) for x in FLOATS], [word(-2.0)] * 32
    got = [of_word(bits) for bits in run("min.xorsign.abs.f32 %o, %a, %b;", *columns)]
    for x, value in zip(FLOATS, got, strict=True):
        if not math.isnan(x):
            assert value == math.copysign(min(abs(of_word(word(x))), 2.0), -math.copysign(1, x))


def test_a_fused_multiply_add_rounds_once():
    a, b, c = 1 + 2.0**-12, 1 + 2.0**-12, -(1 + 2.0**-11)
    columns = [[word(x)] * 32 for x in (a, b, c)]
    assert of_word(run("fma.rn.f32 %o, %a, %b, %c;", *columns)[0]) == 2.0**-24
    assert of_word(run("mul.f32 %o, %a, %b; add.f32 %o, %o, %c;", *columns)[0]) == 0


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_factors_in_half_precision_are_multiplied_exactly(half):
    columns = [[word(x)] * 32 for x in (1 + 2.0**-7, 1 + 2.0**-7, -(1 + 2.0**-6))]
    factors = f"cvt.rn.{half}.f32 %h0, %a; cvt.rn.{half}.f32 %h1, %b;"
    assert of_word(run(f"{factors} fma.rn.f32.{half} %o, %h0, %h1, %c;", *columns)[0]) == 2.0**-14
    assert of_word(run(f"{factors} add.f32.{half} %o, %h0, %c;", *columns)[0]) == 2.0**-7 - 2.0**-6


def test_saturation():
    got = [of_word(bits) for bits in run("add.sat.f32 %o, %a, 0f00000000;", [word(x) for x in FLOATS])]
    assert got == [0.0 if math.isnan(x) else min(max(of_word(word(x)), 0.0), 1.0) for x in FLOATS]


SHUFFLES = {
    "bfly.b32 %o, %a, 5, 31, -1": lambda lane: lane ^ 5,
    "up.b32 %o, %a, 3, 0, -1": lambda lane: lane - 3 if lane >= 3 else lane,
    "down.b32 %o, %a, 3, 31, -1": lambda lane: lane + 3 if lane + 3 < 32 else lane,
    "idx.b32 %o, %a, 9, 31, -1": lambda lane: 9,
    "idx.b32 %o, %a, %b, 31, -1": lambda lane: (lane * 7) % 32,
    "bfly.b32 %o, %a, 5, 0x181f, -1": lambda lane: lane ^ 5,
    "down.b32 %o, %a, 3, 0x181f, -1": lambda lane: lane + 3 if lane % 8 < 5 else lane,
    "idx.b32 %o, %a, 2, 0x181f, -1": lambda lane: lane // 8 * 8 + 2,
}


@pytest.mark.parametrize("form", SHUFFLES)
def test_shuffles(form):
    got = run(f"shfl.sync.{form};", list(range(100, 132)), [lane * 7 % 32 for lane in range(32)])
    assert got == [100 + SHUFFLES[form](lane) for lane in range(32)]


def test_a_shuffle_says_whether_its_lane_was_there():
    got = run("shfl.sync.up.b32 %o|%q, %a, 3, 0, -1; selp.b32 %o, 1, 0, %q;", list(range(32)))
    assert got == [0] * 3 + [1] * 29


def test_atomics_in_shared_memory():
    zero = "mov.b32 %c, 0; st.shared.b32 [global_smem+16], %c; bar.sync 0;"
    total = f"{zero} atom.shared.add.u32 %b, [global_smem+16], %a; bar.sync 0; ld.shared.b32 %o, [global_smem+16];"
    values = list(range(5, 37))
    assert run(total, values, [0] * 32, [0] * 32) == [sum(values)] * 32
    before = f"{zero} atom.shared.add.u32 %o, [global_smem+16], %a;"
    assert run(before, values, [0] * 32, [0] * 32) == [sum(values[:i]) for i in range(32)]
    exchanged = f"{zero} atom.shared.cas.b32 %o, [global_smem+16], 0, %a;"
    assert run(exchanged, values, [0] * 32, [0] * 32) == [0, *[5] * 31]


def test_generic_addresses_lead_to_all_memories():
    assert run("ld.b32 %o, [%p];", WORDS * 2) == WORDS * 2
    shared = "mov.b64 %w, global_smem; mad.wide.u32 %w, %t, 4, %w; st.b32 [%w+8], %a;"
    assert run(f"{shared} ld.b32 %o, [%w+8];", WORDS * 2) == WORDS * 2
    assert run(f"{shared} shl.b32 %t, %t, 2; ld.shared.b32 %o, [%t+8];", WORDS * 2) == WORDS * 2
    local = ".local .align 16 .b8 depot[32]; mov.b64 %w, depot; st.local.b32 [%w+4], %a;"
    assert run(f"{local} ld.b32 %o, [%w+4];", WORDS * 2) == WORDS * 2
    assert run(f"{local} ld.local.b32 %o, [%w];", WORDS * 2) == [MASK32] * 32


def test_a_part_of_a_copy_is_zero():
    copy = "mul.lo.u32 %t, %t, 4; mov.b32 %b, {}; cp.async.ca.shared.global [%t], [%p], 4, %b; cp.async.wait_all;"
    for size, mask in ((0, 0), (1, 0xFF), (2, 0xFFFF), (3, 0xFFFFFF), (4, MASK32)):
        got = run(copy.format(size) + "ld.shared.b32 %o, [%t];", WORDS * 2, [0] * 32)
        assert got == [value & mask for value in WORDS * 2]


def test_a_trap_is_an_error():
    with pytest.raises(EmulatorError, match=r"thread 3 of block .* gave up"):
        run("setp.eq.s32 %q, %a, 3; @%q trap; mov.b32 %o, 0;", list(range(32)))


def test_matrix_instructions_do_not_depend_on_how_many_run_together():
    """Three that share nothing, one that adds to the first, one that overwrites what the second has read."""
    fill = ".reg .b32 %x<30>; .reg .b32 %d<12>;"
    for i in range(30):
        fill += f"mad.lo.u32 %x{i}, %a, {2 * i + 12345}, {i * 7919}; and.b32 %x{i}, %x{i}, 0x3bff3bff;"
    fill += "".join(f"mov.b32 %d{i}, 0;" for i in range(12))
    operands = [(0, 0, 12), (4, 4, 14), (8, 8, 16), (0, 4, 16)]
    form = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"

    def registers(letter: str, first: int, count: int) -> str:
        return "{" + ", ".join(f"%{letter}{first + i}" for i in range(count)) + "}"

    products = [
        f"{form} {registers('d', d, 4)}, {registers('x', a, 4)}, {registers('x', b, 2)}, {registers('d', d, 4)};"
        for d, a, b in operands
    ]
    products.append(
        f"{form} {registers('x', 4, 4)}, {registers('x', 0, 4)}, {registers('x', 12, 2)}, {registers('d', 8, 4)};"
    )
    results = [f"%d{i}" for i in range(12)] + [f"%x{i}" for i in range(4, 8)]
    together = fill + "".join(products)
    apart = fill + "setp.lt.u32 %q, %t, 99;" + "".join(f"@%q {product}" for product in products)
    values = [1103515245 * i % 2**31 for i in range(1, 33)]
    for result in results:
        got = run(f"{together} mov.b32 %o, {result};", values)
        assert got == run(f"{apart} mov.b32 %o, {result};", values)
        assert len(set(got)) > 16


def test_votes_and_reductions():
    values = [lane % 5 for lane in range(32)]
    ballot = sum(1 << lane for lane in range(32) if values[lane] == 3)
    assert run("setp.eq.s32 %q, %a, 3; vote.sync.ballot.b32 %o, %q, -1;", values) == [ballot] * 32
    any_of = "setp.eq.s32 %q, %a, 3; vote.sync.any.pred %q, %q, -1; selp.b32 %o, 1, 0, %q;"
    assert run(any_of, values) == [1] * 32
    assert run(any_of.replace("any", "all"), values) == [0] * 32
    assert run("redux.sync.add.s32 %o, %a, -1;", values) == [sum(values)] * 32
    assert run("redux.sync.max.u32 %o, %a, -1;", values) == [4] * 32


def test_threads_that_part_meet_again():
    body = """
    mov.b32 %o, 0;
    setp.lt.s32 %q, %a, 10;
    @%q bra $low;
    add.s32 %o, %o, 100;
    bra.uni $end;
$low:
    add.s32 %o, %o, 1;
    add.s32 %a, %a, 1;
    setp.lt.s32 %q, %a, 10;
    @%q bra $low;
$end:
    redux.sync.add.s32 %b, %o, -1;
    add.s32 %o, %o, %b;
    """
    parts = [10 - lane if lane < 10 else 100 for lane in range(32)]
    assert run(body, list(range(32)), [0] * 32) == [part + sum(parts) for part in parts]


def test_threads_that_return_early_are_gone():
    got = run("mov.b32 %o, 1; setp.lt.s32 %q, %a, 10; @%q ret;", list(range(32)))
    assert got == [0] * 10 + [1] * 22


@pytest.mark.parametrize("body", ["setp.lt.s32 %q|%r, %a, 1;", "cvt.rz.f32.f64 %o, %w;", "prmt.b32.f4e %o, %a, %a, 0;"])
def test_forms_that_are_not_known_are_refused(body):
    with pytest.raises(UnknownInstruction):
        run(body, WORDS * 2)
