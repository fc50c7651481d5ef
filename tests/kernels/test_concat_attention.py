"""Attention to tokens and vectors on a GPU: two kernels beside a flash library, what they move and leave alone.

The library is a stand-in, the kernels run on the emulator.
"""

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    pytest.skip("TRITON_INTERPRET is set: there is no compiled code to execute", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton")

from torch.nn import functional as F

from mmmae.cost.costs import total
from mmmae.cost.counting import count_operators
from mmmae_kernels import concat_attention, use_backend
from mmmae_kernels.attention import gpu
from mmmae_kernels.attention.guidance import merging_backend
from mmmae_kernels.transformer_block.conditioning import FusedConditioning
from tests.cases.attention import guided_case, presence
from tests.cases.case import TYPES, check, draw
from tests.cases.conditioning import conditioning_case
from tests.emulator.gpu import Emulator, emulated


def halves(*shape, seed=0):
    return draw(*shape, seed=seed).bfloat16()


def test_four_launches_move_each_tensor_once_a_kernel():
    """The two of attention: q, k, v to out; then grad, q, k, v, out to three gradients. The two that merge: q and out,
    overwritten; then grad, q, out and the gradient of q, overwritten.
    """
    batch, tokens, count, heads, width = 64, 196, 3, 12, 64
    qkv = torch.empty(batch, tokens, 3, heads, width, dtype=torch.bfloat16, requires_grad=True)
    vectors = torch.empty(batch, count, 2, heads, width, dtype=torch.bfloat16, requires_grad=True)
    present = torch.ones(batch, count, dtype=torch.bool)
    grad = torch.empty(batch, tokens, heads, width, dtype=torch.bfloat16)

    def merged():
        torch.autograd.grad(concat_attention(qkv, vectors, present), (qkv, vectors), grad)

    def concatenated():
        (q, k, v), (keys, values) = qkv.unbind(2), vectors.unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (q, torch.cat([k, keys], 1), torch.cat([v, values], 1)))
        mask = torch.cat([present.new_ones(batch, tokens), present], dim=1)[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        torch.autograd.grad(out, (qkv, vectors), grad)

    ours, usual = (total(count_operators(function, target="sm90")) for function in (merged, concatenated))
    tensors = (3 + 1) + (5 + 3) + (2 + 1) + (4 + 1)
    least = tensors * qkv[:, :, 0].nbytes + 3 * vectors.nbytes
    assert ours.launches == 4
    assert least <= ours.bytes <= 1.05 * least
    assert ours.bytes <= 0.95 * usual.bytes


@pytest.mark.parametrize("case", [guided_case(21, 3, 32), guided_case(33, 2, 80, strided="transposed")], ids=str)
def test_the_op_is_its_definition_beside_a_flash_library(on_gpu, case):
    on_gpu("sm80", "flash_attn_2")
    with emulated(Emulator("sm80")):
        check(case, TYPES["bf16"])


def test_the_conditioning_step_is_its_definition_beside_a_flash_library(on_gpu, monkeypatch):
    on_gpu("sm80", "flash_attn_2")
    steps, forward = [], FusedConditioning.forward
    monkeypatch.setattr(FusedConditioning, "forward", lambda *call: (steps.append(call), forward(*call))[1])
    with emulated(Emulator("sm80")):
        check(conditioning_case("odd", ""), TYPES["mixed bf16"])
    assert len(steps) == 1


def test_a_sample_without_vectors_is_left_as_it_is():
    """And so is what absent vectors hold, which is NaN here."""
    q, out, grad, grad_q = (halves(4, 33, 2, 16, seed=seed) for seed in range(4))
    vectors, present, lse = halves(4, 2, 2, 2, 16), presence(2)[:4], draw(4, 2, 33).float()
    vectors[~present] = math.nan
    merged, added = out.clone(), grad_q.clone()
    with emulated(Emulator("sm80")):
        merged_lse = gpu.merge_vectors(q, merged, lse, vectors, present)
        grad_vectors = gpu.merge_vectors_backward(grad, q, merged, merged_lse, vectors, present, added)
    for before, after in ((out, merged), (lse, merged_lse), (grad_q, added)):
        assert torch.equal(before[0], after[0])
        assert after.isfinite().all()
        assert not torch.equal(before[1:], after[1:])
    assert not grad_vectors[~present].any()
    assert grad_vectors[present].any(-1).all()


def test_triton_merges_where_it_serves_and_is_not_switched_off():
    q = torch.zeros(1, 2, 1, 8)
    assert merging_backend(q) == "native" or torch.cuda.is_available()
    with emulated(Emulator("sm80")):
        assert merging_backend(q) == "triton"
        assert merging_backend(q.double()) == "native"
        for name in ("native", "eager"):
            with use_backend(name):
                assert merging_backend(q) == "native"


def test_attention_that_can_not_be_overwritten_is_refused():
    q = torch.zeros(1, 2, 3, 8).transpose(1, 2)
    lse, vectors, present = torch.zeros(1, 2, 3), torch.zeros(1, 1, 2, 2, 8), torch.ones(1, 1, dtype=torch.bool)
    with emulated(Emulator("sm80")), pytest.raises(ValueError, match=r"out has strides \[48, 8, 24, 1\], "):
        gpu.merge_vectors(q, q, lse, vectors, present)
