"""Of architectures that are alike one is compiled, and now and then the others are compared with it."""

import pytest
import torch
import triton

from tests.emulator import kernels
from tests.emulator.ptx import compilation

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET: nothing is compiled")


@pytest.fixture(autouse=True)
def lowered(tmp_path, monkeypatch):
    """Forget what was compiled, in memory and in Triton's cache; yield what is known of alike architectures."""
    known = {}
    monkeypatch.setattr(compilation, "_COMPILED", {})
    monkeypatch.setattr(compilation, "_LOWERED", known)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    return known


def ptx(target):
    arguments = {name: torch.zeros(300) for name in ("x_ptr", "y_ptr", "out_ptr")} | {"n": 300, "BLOCK": 256}
    return compilation.compile_kernel(kernels.scale_where_positive, arguments, target, {"num_warps": 4})[0].ptx


def test_alike_architectures_share_code_but_for_their_name(lowered, monkeypatch):
    monkeypatch.setattr(compilation, "_COMPARED", 1)  # all of them
    first, second, third = ptx("sm80"), ptx("sm86"), ptx("sm90")
    assert len(lowered) == 1
    assert second == first.replace(".target sm_80", ".target sm_86") != first
    assert third.replace(".target sm_90", ".target sm_80") != first


def test_code_that_differs_is_an_error(lowered, monkeypatch):
    monkeypatch.setattr(compilation, "_COMPARED", 1)
    ptx("sm80")
    (key, (code, metadata)) = next(iter(lowered.items()))
    lowered[key] = code + "// another", metadata
    with pytest.raises(AssertionError, match="sm_89 has other code than sm_80"):
        ptx("sm89")
