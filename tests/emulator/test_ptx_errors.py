"""The PTX emulator sees what is wrong with a program: each test breaks a good one."""

import re

import pytest
import torch
import triton

from tests.emulator import kernels
from tests.emulator.ptx import Divergence, Misaligned, OutOfBounds, Race, UnknownInstruction, execute
from tests.emulator.ptx.compilation import compile_kernel

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET: nothing is compiled")


class Case:
    """A launch that is right as long as its PTX is; `wrong` tells how far its result is from the truth."""

    def __init__(self, kernel, grid, arguments, expected, out="out_ptr"):
        self.kernel, self.grid, self.arguments, self.expected, self.out = kernel, grid, arguments, expected, out
        options = {"num_warps": 4, "num_stages": 3}
        self.ptx = compile_kernel(kernel, arguments, "sm80", options)[0].ptx

    def run(self, mutate=None) -> torch.Tensor:
        self.arguments[self.out].fill_(5)
        execute(self.kernel, self.grid, self.arguments, mutate=mutate)
        return self.arguments[self.out]

    def is_right(self, mutate=None) -> bool:
        return torch.allclose(self.run(mutate).double(), self.expected.double(), rtol=1e-3, atol=1e-3)


def rows() -> Case:
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(n, 401, generator=generator) for n in (5, 11))
    ids = torch.randperm(11, generator=generator)[:5]
    arguments = {"prediction_ptr": prediction, "target_ptr": target, "ids_ptr": ids, "out_ptr": torch.zeros(5)}
    expected = ((prediction - target[ids]) ** 2).mean(1)
    return Case(kernels.row_distance, (5,), arguments | {"D": 401, "BLOCK_D": 512}, expected)


def product() -> Case:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).half() for shape in ((50, 160), (160, 64)))
    ids = torch.randperm(50, generator=generator)[:40]
    arguments = {"a_ptr": a, "b_ptr": b, "out_ptr": torch.zeros(40, 64), "ids_ptr": ids, "M": 40, "N": 64, "K": 160}
    arguments |= {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "PRECISION": "ieee", "STAGES": 3}
    return Case(kernels.gather_matmul, (2, 2), arguments, a[ids].double() @ b.double())


def norm() -> Case:
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    arguments = {"x_ptr": x, "weight_ptr": None, "bias_ptr": None, "out_ptr": torch.zeros(3, 512), "stride": 512}
    expected = torch.nn.functional.layer_norm(x.float(), (512,))
    return Case(kernels.layer_norm, (3,), arguments | {"D": 512, "eps": 1e-5, "BLOCK_D": 512}, expected)


def sort() -> Case:
    x = torch.randint(-(2**62), 2**62, (2, 512), generator=torch.Generator().manual_seed(0))
    return Case(kernels.sort_rows, (2,), {"x_ptr": x, "out_ptr": torch.zeros_like(x), "N": 512}, x.sort(1).values)


CASES = {case.__name__: case for case in (rows, product, norm, sort)}


def replace_nth(pattern: str, replacement: str, n: int):
    """Return a mutation that replaces the nth match."""

    def mutate(ptx: str) -> str:
        match = list(re.finditer(pattern, ptx))[n]
        return ptx[: match.start()] + match.expand(replacement) + ptx[match.end() :]

    return mutate


def outcome(case: Case, mutate) -> str:
    try:
        return "right" if case.is_right(mutate) else "wrong"
    except (Race, OutOfBounds, Misaligned, UnknownInstruction) as error:
        return type(error).__name__


@pytest.mark.parametrize("name", CASES)
def test_the_unbroken_program_is_right(name):
    assert CASES[name]().is_right()


@pytest.mark.parametrize("name", CASES)
def test_every_barrier_that_is_dropped_is_a_race(name):
    case = CASES[name]()
    count = len(re.findall(r"bar\.sync\s+0;", case.ptx))
    outcomes = [outcome(case, replace_nth(r"bar\.sync\s+0;", "", n)) for n in range(count)]
    # The first barrier of the product lies between copies to different places, where none is needed.
    assert outcomes == ["right" if name == "product" and n == 0 else "Race" for n in range(count)]
    assert count > (name == "product")


def test_a_race_says_who_and_where():
    with pytest.raises(Race, match=r"row_distance: thread \d+ of block \(\d, 0, 0\).*(ld|st)\.shared.*another warp"):
        rows().run(lambda ptx: ptx.replace("bar.sync", "//"))


def test_a_copy_that_is_not_waited_for_is_seen():
    case = product()
    waits = re.findall(r"cp\.async\.wait_group\s+(\d);", case.ptx)
    assert waits == ["2", "0"]
    assert outcome(case, replace_nth(r"cp\.async\.wait_group\s+2;", "", 0)) == "Race"
    assert outcome(case, replace_nth(r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 3;", 0)) == "Race"
    assert outcome(case, replace_nth(r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 0;", 0)) == "right"
    with pytest.raises(Race, match=r"ldmatrix.*cp\.async has not landed yet"):
        case.run(replace_nth(r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 4;", 0))


def test_a_copy_that_is_in_no_group_is_seen():
    assert outcome(product(), lambda ptx: ptx.replace("cp.async.commit_group;", "")) == "Race"


ACCESSES = ("ld.global", "st.global", "ld.shared", "st.shared", "ldmatrix", "cp.async.c")


def check_changed_offsets(name, access, every):
    """Change the first, middle and last offset of an access, or `every` one, each alone, and see the launch fail."""
    case = CASES[name]()
    pattern = rf"({re.escape(access)}[^;]*\[\s*%r\w*)(\s*\+\s*(\d+)\s*)?\]"
    found = list(enumerate(re.finditer(pattern, case.ptx)))
    for n, match in found if every or len(found) <= 3 else [found[0], found[len(found) // 2], found[-1]]:
        element = 8 if name == "sort" else 4 if "32" in match[1] or "32" in access else 2
        changed = replace_nth(pattern, rf"\g<1>+{int(match[3] or 0) + element}]", n)
        assert outcome(case, changed) != "right", match[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("access", ACCESSES)
def test_an_offset_that_is_changed_is_seen(name, access):
    """tests/soak/test_ptx_offsets.py changes all of them."""
    check_changed_offsets(name, access, every=False)


def test_an_address_in_the_middle_of_an_element_is_misaligned():
    with pytest.raises(Misaligned, match=r"row_distance: thread 0 of block \(0, 0, 0\), address 0x.*ld\.global\.b64"):
        rows().run(replace_nth(r"(ld\.global\.b64 .*) \+ 0", r"\1 + 4", 0))
    with pytest.raises(Misaligned, match=r"ldmatrix"):
        product().run(replace_nth(r"(ldmatrix.*)\[(%r\d+)\]", r"\1[\2+2]", 0))
    with pytest.raises(Misaligned, match=r"st\.shared"):
        rows().run(replace_nth(r"(st\.shared.*\[ %r\d+) \+ 0", r"\1 + 1", 0))


def test_an_address_outside_of_shared_memory_is_seen():
    with pytest.raises(OutOfBounds, match=r"st\.shared.*16 bytes of shared memory"):
        rows().run(replace_nth(r"(st\.shared.*\[ %r\d+) \+ 0", r"\1 + 16", 0))
    with pytest.raises(OutOfBounds, match=r"cp\.async.*16384 bytes of shared memory|cp\.async.*bytes of shared memory"):
        product().run(replace_nth(r"(cp\.async\.cg.*\[ %r\d+) \+ 0", r"\1 + 65536", 0))


def test_a_mask_that_is_one_too_wide_is_seen():
    x, out = torch.zeros(200), torch.zeros(256)
    arguments = {"x_ptr": x, "out_ptr": out, "x_stride": 1, "out_stride": 1, "n": 200, "BLOCK": 128}
    with pytest.raises(OutOfBounds, match=r"thread 72 of block \(1, 0, 0\).*ends 4 bytes after the memory of x_ptr"):
        execute(kernels.copy, (2,), arguments, mutate=lambda ptx: ptx.replace("setp.lt.s64", "setp.le.s64"))


def test_shared_memory_that_was_never_written_is_nan():
    assert rows().run(lambda ptx: re.sub(r"@%p\d+ st\.shared[^;]*;", "", ptx)).isnan().all()


def test_a_register_that_was_never_written_is_nan():
    assert rows().run(replace_nth(r"div\.full\.f32\s+%r\d+,", "div.full.f32 %r1,", 0)).isnan().all()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("shfl.sync.bfly", "shfl.sync.shuffle"),
        ("ld.shared.b32", "ld.shared.b33"),
        ("ld.shared.b32", "ld.shared.mmio.b32"),
        ("bar.sync \t0;", "bar.sync \t0, 64;"),
        ("div.full.f32", "div.rz.f32"),
        ("ret;", "call foo;"),
        ("ret;", "mbarrier.expect_tx.shared.b64 [%r1], 1;"),
        ("add.f32", "add.f64"),
        ("%tid.x", "%cluster_ctaid.x"),
        (".reg .pred", ".shared .b32 x;\n.reg .pred"),
    ],
)
def test_what_is_not_known_is_refused_before_anything_runs(old, new):
    case = rows()
    assert old in case.ptx
    with pytest.raises(UnknownInstruction):
        case.run(lambda ptx: ptx.replace(old, new))
    assert (case.arguments["out_ptr"] == 5).all()


def test_a_shuffle_of_a_part_of_a_warp_is_seen():
    half = "setp.lt.u32 %half, %tid.x, 40;\n@%half shfl.sync.bfly"

    def mutate(ptx: str) -> str:
        ptx = ptx.replace("shfl.sync.bfly", half, 1)
        return ptx.replace(".reg .pred", ".reg .pred %half;\n.reg .pred", 1)

    with pytest.raises(Divergence, match=r"thread 32 of block \(0, 0, 0\)"):
        rows().run(mutate)


def test_a_mutation_that_changes_nothing_is_an_error():
    with pytest.raises(ValueError, match="does not change"):
        rows().run(lambda ptx: ptx.replace("wgmma", ""))


def test_an_error_leaves_nothing_behind():
    case = product()
    with pytest.raises(Race):
        case.run(lambda ptx: ptx.replace("bar.sync", "//"))
    assert case.is_right()


def test_different_values_in_one_place_are_a_race():
    ids, values, out = torch.arange(100) % 50, torch.arange(100) % 50, torch.zeros(50, dtype=torch.int64)
    arguments = {"ids_ptr": ids, "values_ptr": values, "out_ptr": out, "n": 100, "BLOCK": 128}
    execute(kernels.scatter, (1,), arguments)
    assert torch.equal(out, torch.arange(50))
    values[70] = 5
    with pytest.raises(Race, match="1 threads write"):
        execute(kernels.scatter, (1,), arguments)
