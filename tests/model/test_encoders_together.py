"""Auxiliary encoders that are computed as one: when they are, and that nothing but the launches changes.

Triton's kernels are computed here by the native ones, a weight's part of the rows at a time.
"""

import copy
import functools

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="needs triton")

import mmmae
from mmmae.model import auxiliary
from mmmae.model.auxiliary import plan_encoders
from mmmae_kernels import operators, random_masking, use_backend
from mmmae_kernels.cpu import library
from mmmae_kernels.gpu.executors import execute_by

pytestmark = pytest.mark.skipif(library.unavailable_reason() is not None, reason=str(library.unavailable_reason()))

CONFIG = mmmae.MMMAEConfig.preset("tiny", image_size=32, patch=(3, 8, 8), aux_patch=16, depth=2, aux_depth=2)
NAMES = list(CONFIG.aux)
# Of the kernels that take stacked weights: the places of tensors with rows, and of weights; results that are for each
# weight, and statistics, whose rows are in the second axis.
STACKED = {
    "add_layer_norm_forward": ((0, 1), (2, 3, 4), (), (2,)),
    "add_layer_norm_backward": ((0, 1, 2), (3, 4), (1, 2, 3), ()),
    "gelu_forward": ((0,), (1,), (), ()),
    "gelu_backward": ((0, 1), (2,), (1,), ()),
}
STATISTICS = {"add_layer_norm_backward": 5}


class NoLaunches:
    """An executor for kernels that are all computed by others."""

    target = "sm90"

    def __call__(self, launch):
        raise AssertionError(f"{launch.kernel.fn.__name__} was launched")


def by_parts(name, *arguments):
    """Call a native kernel for each weight of a stack and its part of the rows."""
    kernel = getattr(operators._direct["native"], name)
    rows, weights, of_weights, statistics = STACKED[name]
    count = next(
        (arguments[at].shape[0] for at in weights if arguments[at] is not None and arguments[at].dim() == 2), 0
    )
    if count == 0:
        return kernel(*arguments)
    parts = []
    for part in range(count):
        call = list(arguments)
        for at in rows:
            call[at] = None if call[at] is None else call[at].chunk(count)[part]
        for at in weights:
            call[at] = None if call[at] is None else call[at][part]
        if name in STATISTICS:
            call[STATISTICS[name]] = call[STATISTICS[name]].chunk(count, dim=1)[part].contiguous()
        parts.append(kernel(*call))
    return tuple(
        None
        if found[0] is None
        else torch.stack(found)
        if at in of_weights
        else torch.cat(found, int(at in statistics))
        for at, found in enumerate(zip(*parts, strict=True))
    )


@pytest.fixture
def gpu(monkeypatch):
    """Compute with the native kernels what a GPU does with Triton's; return how many encoders ran at once, by call."""
    for name in operators._folders:
        in_parts = functools.partial(by_parts, name)
        function = in_parts if name in STACKED else getattr(operators._direct["native"], name)
        monkeypatch.setattr(operators._direct["triton"], name, function, raising=False)
    calls = []
    encode = auxiliary.encode_together
    monkeypatch.setattr(
        mmmae.model.fast,
        "encode_together",
        lambda *arguments: (calls.append(len(arguments[0].encoders)), encode(*arguments))[1],
    )
    with execute_by(NoLaunches()):
        yield calls


def models(**fields):
    torch.manual_seed(0)
    reference = mmmae.reference_model(CONFIG.replace(**fields))
    return reference, mmmae.fast_model(copy.deepcopy(reference), kernels="triton")


def call(model, names=NAMES, present=None):
    generator = torch.Generator().manual_seed(1)
    hsi = torch.randn(2, 1, CONFIG.bands, 32, 32, generator=generator)
    images = {name: torch.randn(2, CONFIG.aux[name], 32, 32, generator=generator) for name in NAMES}
    with use_backend("eager"):
        mask = random_masking(2, CONFIG.tokens, CONFIG.keep, seed=0)
    return model(hsi, {name: images[name] for name in names}, present, mask=mask, seed=3)


def gradients(model, *arguments):
    model.zero_grad()
    output = call(model, *arguments)
    output.loss.backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_alike(reference, fast, *arguments):
    expected, wanted = gradients(reference, *arguments)
    output, found = gradients(fast, *arguments)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=0)
    assert (output.latent - expected.latent).norm() <= 1e-5 * expected.latent.norm()
    for name, want in wanted.items():
        assert (found[name] is None) == (want is None), name
        if want is not None:
            assert (found[name] - want).norm() <= 1e-4 * want.norm() + 1e-7, name


@pytest.mark.parametrize("names", [NAMES, NAMES[1:], NAMES[:1]], ids=len)
def test_outputs_and_gradients_are_those_of_the_reference(gpu, names):
    assert_alike(*models(), names)
    assert gpu == ([len(names)] if len(names) > 1 else [])


def test_samples_may_lack_images(gpu):
    present = {NAMES[0]: torch.tensor([True, False]), NAMES[2]: torch.tensor([False, False])}
    assert_alike(*models(), NAMES, present)
    assert gpu == [3]


def test_gradients_of_the_parameters_are_views_that_were_not_copied(gpu):
    _, fast = models()
    gradients(fast)
    weights = [fast.aux_encoders[name].blocks[0].attn.qkv.weight for name in NAMES]
    first, *others = [weight.grad.untyped_storage() for weight in weights]
    assert first.nbytes() == len(NAMES) * weights[0].numel() * 4
    assert all(other.data_ptr() == first.data_ptr() for other in others)


def test_gradients_accumulate(gpu):
    _, fast = models()
    _, once = gradients(fast)
    expected = {name: 2 * gradient for name, gradient in once.items()}
    call(fast).loss.backward()
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_frozen_parameters_get_no_gradients(gpu):
    _, fast = models()
    fast.aux_encoders[NAMES[0]].requires_grad_(False)
    for name in NAMES:
        fast.aux_encoders[name].blocks[1].mlp.fc1.requires_grad_(False)
    _, found = gradients(fast)
    for name, parameter in fast.named_parameters():
        assert (found[name] is not None) == parameter.requires_grad, name
    assert gpu == [3]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_without_gradients(gpu, mode):
    reference, fast = models()
    with mode():
        torch.testing.assert_close(call(fast.eval()).loss, call(reference.eval()).loss, rtol=1e-5, atol=0)
    assert gpu == [3]


def test_a_copy_of_the_model_has_its_own_weights(gpu):
    _, fast = models()
    twin = copy.deepcopy(fast)
    before = call(fast).loss
    with torch.no_grad():
        twin.aux_encoders[NAMES[0]].blocks[0].attn.qkv.weight.mul_(2)
    assert call(fast).loss == before
    assert call(twin).loss != before
    assert gpu == [3, 3, 3]


def replace(model, path, child):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, child)


def wrap(path):
    return lambda model: replace(model, path, nn.Sequential(model.get_submodule(path)))


def halve(path):
    return lambda model: setattr(model.get_submodule(path), "forward", lambda *arguments: None)


def hook(path):
    return lambda model: model.get_submodule(path).register_forward_hook(lambda module, args, out: out)


def shorten(path):
    return lambda model: setattr(model.get_submodule(path), "blocks", model.get_submodule(path).blocks[:1])


ENCODER = f"aux_encoders.{NAMES[1]}"
CHANGES = {
    "hooked encoder": hook(ENCODER),
    "hooked block": hook(f"{ENCODER}.blocks.1"),
    "hooked layer": hook(f"{ENCODER}.blocks.1.mlp.fc1"),
    "hooked norm": hook(f"{ENCODER}.norm"),
    "wrapped encoder": wrap(ENCODER),
    "wrapped block": wrap(f"{ENCODER}.blocks.0"),
    "wrapped layer": wrap(f"{ENCODER}.blocks.0.attn.proj"),
    "another forward": halve(ENCODER),
    "another forward of a block": halve(f"{ENCODER}.blocks.0"),
    "another epsilon": lambda model: setattr(model.get_submodule(f"{ENCODER}.norm"), "eps", 1e-3),
    "fewer blocks": shorten(ENCODER),
    "compiled block": lambda model: setattr(model.get_submodule(f"{ENCODER}.blocks.0"), "_compiled_call_impl", print),
    "other heads": lambda model: setattr(model.get_submodule(f"{ENCODER}.blocks.0.attn"), "heads", 2),
    "another dtype": lambda model: model.get_submodule(ENCODER).double(),
    "another attention": lambda model: setattr(model.get_submodule(f"{ENCODER}.blocks.0.attn"), "backend", "eager"),
}


def planned(model):
    with model.backend():
        return plan_encoders(model.aux_encoders.values())


@pytest.mark.parametrize("change", CHANGES)
def test_encoders_that_are_not_alike_and_unchanged_run_by_themselves(gpu, change):
    _, fast = models()
    assert planned(fast) is not None
    CHANGES[change](fast)
    assert planned(fast) is None


@pytest.mark.parametrize("kernels", ["native", "eager"])
def test_encoders_run_by_themselves_on_a_cpu(kernels):
    assert planned(mmmae.fast_model(CONFIG, kernels=kernels)) is None


def test_encoders_without_blocks_run_by_themselves(gpu):
    assert planned(mmmae.fast_model(CONFIG.replace(aux_encoder="cnn"), kernels="triton")) is None


def test_a_wrong_shape_is_refused_as_by_a_single_block(gpu):
    _, fast = models()
    for name in NAMES:
        fast.aux_encoders[name].blocks[0].mlp.fc1.weight = nn.Parameter(torch.zeros(7, CONFIG.aux_dim))
    with pytest.raises(ValueError, match="fc1_bias has shape"):
        call(fast)


def test_the_weights_are_copied_once_by_few_operators(gpu, monkeypatch):
    _, fast = models()
    copies = []
    copy_lists = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *lists: (copies.append(len(lists[0])), copy_lists(*lists))[1])
    call(fast)
    assert copies == [len(NAMES) * (2 * 12 + 2)]  # two blocks, and the norm
