"""Changes of a layer inside the fast model take effect, as they do in the reference: hooks, wrappers, replacements."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

import mmmae
from mmmae.model.layers import product_parameters

CONFIG = mmmae.MMMAEConfig.preset("tiny", image_size=32, patch=(3, 8, 8), aux_patch=16, depth=2, decoder_depth=2)
LINEARS = ("blocks.0.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1", "decoder_blocks.1.attn.qkv")
READ = ("patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred", "aux_encoders.ir.patch_embed")
READ += ("aux_encoders.ir.norm", "aux_encoders.ir.blocks.0.mlp.fc2", "conditioning.0.attn.qkv", "blocks.0.norm1")


def models():
    torch.manual_seed(0)
    reference = mmmae.reference_model(CONFIG, attention="sdpa")
    return reference, mmmae.fast_model(copy.deepcopy(reference))


def data():
    generator = torch.Generator().manual_seed(1)
    hsi = torch.randn(2, 1, CONFIG.bands, 32, 32, generator=generator)
    return hsi, {name: torch.randn(2, channels, 32, 32, generator=generator) for name, channels in CONFIG.aux.items()}


def train(model, steps=3):
    """Train a model; return the losses of the steps, and the parameters after them."""
    hsi, aux = data()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(hsi, aux, seed=step).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def replace(model, path, child):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, child)


class Lora(nn.Module):
    """A wrapper like peft's, which adds a term of low rank to the output of the base layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)
        nn.init.constant_(self.up.weight, 0.01)
        nn.init.constant_(self.down.weight, 0.02)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Opaque(nn.Module):
    """A wrapper without a weight of its own."""

    def __init__(self, base):
        super().__init__()
        self.inner = base

    def forward(self, x):
        return 1.5 * self.inner(x)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def halve(layer):
    layer.forward = lambda x: nn.Linear.forward(layer, x) / 2


def set_epsilon(model, path):
    model.get_submodule(path).eps = 0.5


def unregister(layer):
    weight = layer.weight.detach() * 2
    del layer.weight
    layer.weight = weight


def each(paths, change):
    def treat(model):
        torch.manual_seed(2)  # norms by power iteration start at random
        for path in paths:
            change(model, path)

    return treat


TREATMENTS = {
    "lora": each(LINEARS, lambda model, path: replace(model, path, Lora(model.get_submodule(path)))),
    "a wrapper without weight": each(
        (*LINEARS, "decoder_pred", "blocks.0.norm1"),
        lambda model, path: replace(model, path, Opaque(model.get_submodule(path))),
    ),
    "a hook that changes the output": each(
        (*LINEARS, *READ),
        lambda model, path: model.get_submodule(path).register_forward_hook(lambda module, args, out: 1.25 * out),
    ),
    "another forward": each(LINEARS, lambda model, path: halve(model.get_submodule(path))),
    "another epsilon": each(("blocks.0.norm1", "conditioning.0.norm"), lambda model, path: set_epsilon(model, path)),
    "no bias": each(LINEARS, lambda model, path: setattr(model.get_submodule(path), "bias", None)),
    "a weight that is no parameter": each(LINEARS, lambda model, path: unregister(model.get_submodule(path))),
    "prune": each(LINEARS, lambda model, path: prune.l1_unstructured(model.get_submodule(path), "weight", 0.5)),
    "weight_norm": each(LINEARS, lambda model, path: parametrizations.weight_norm(model.get_submodule(path))),
    "spectral_norm": each(LINEARS, lambda model, path: parametrizations.spectral_norm(model.get_submodule(path))),
    "orthogonal": each(LINEARS[1:2], lambda model, path: parametrizations.orthogonal(model.get_submodule(path))),
    "parametrize": each(
        (*LINEARS, "patch_embed.proj"),
        lambda model, path: parametrize.register_parametrization(model.get_submodule(path), "weight", Double()),
    ),
    "old weight_norm": each(LINEARS, lambda model, path: old_weight_norm(model.get_submodule(path))),
    "old spectral_norm": each(LINEARS, lambda model, path: old_spectral_norm(model.get_submodule(path))),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", TREATMENTS)
def test_the_fast_model_trains_as_the_reference_treated_alike(name):
    reference, fast = models()
    untreated, _ = train(copy.deepcopy(fast), steps=1)
    for model in (reference, fast):
        TREATMENTS[name](model)
    wanted, wanted_parameters = train(reference)
    losses, parameters = train(fast)
    assert losses == pytest.approx(wanted, rel=1e-4)
    assert parameters.keys() == wanted_parameters.keys()
    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter, wanted_parameters[key], rtol=2e-3, atol=2e-5, msg=key)
    if name not in ("lora", "weight_norm", "old weight_norm", "no bias"):  # these change nothing at first, or little
        assert losses[0] != pytest.approx(untreated[0], rel=1e-6)


def test_adapters_are_trained():
    _, fast = models()
    fast.requires_grad_(False)
    TREATMENTS["lora"](fast)
    before = {name: parameter.detach().clone() for name, parameter in fast.named_parameters() if ".up." in name}
    train(fast)
    for name, parameter in fast.named_parameters():
        if ".up." in name:
            assert not torch.equal(parameter, before[name]), name


def test_lora_of_peft_trains_as_on_the_reference():
    peft = pytest.importorskip("peft", reason="needs peft")
    trained = []
    for model in models():
        torch.manual_seed(3)
        config = peft.LoraConfig(
            r=2, target_modules=["qkv", "proj"], init_lora_weights=False, exclude_modules=["patch_embed.proj"]
        )
        adapted = peft.get_peft_model(model, config)
        before = {n: p.detach().clone() for n, p in adapted.named_parameters() if "lora_B" in n}
        losses, parameters = train(adapted)
        moved = {n: p for n, p in parameters.items() if "lora_B" in n}
        assert moved
        assert all(not torch.equal(p, before[n]) for n, p in moved.items())
        trained.append((losses, moved))
    (wanted, wanted_parameters), (losses, parameters) = trained
    assert losses == pytest.approx(wanted, rel=1e-4)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, wanted_parameters[name], rtol=2e-3, atol=2e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_are_called():
    reference, fast = models()
    hsi, aux = data()
    outputs = []
    for model in (reference, fast):
        quantised = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)
        with torch.no_grad():
            outputs.append(quantised(hsi, aux, seed=0))
    theirs, ours = (output.prediction for output in outputs)
    plain = fast.eval()(hsi, aux, seed=0).prediction
    # An activation close to a rounding border may be rounded either way, which is 1/127 of its range.
    assert (ours - theirs).norm() <= (theirs - plain).norm()
    assert (ours - plain).norm() > 1e-3 * plain.norm()


def layers_of(model):
    """Return the modules that a forward pass calls, which containers are not."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    }


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "backward", "backward_pre"])
def test_hooks_fire_on_every_layer(kind):
    _, fast = models()
    fired = set()
    for name, module in layers_of(fast).items():
        register = {
            "forward": module.register_forward_hook,
            "forward_pre": module.register_forward_pre_hook,
            "backward": module.register_full_backward_hook,
            "backward_pre": module.register_full_backward_pre_hook,
        }[kind]
        register(lambda *_, name=name: fired.add(name))
    train(fast, steps=1)
    missed = set(layers_of(fast)) - fired
    if "backward" in kind:  # the target of the loss has no gradient; the volume needs none
        missed -= {"patch_embed"}
    assert missed == set()


def test_a_child_put_back_is_read_again():
    _, fast = models()
    hsi, aux = data()
    expected = fast(hsi, aux, seed=0).loss
    block = fast.blocks[0]
    assert block._made.holds(block)
    handle = block.attn.qkv.register_forward_hook(lambda module, args, out: 2 * out)
    assert not block._made.holds(block)
    assert fast(hsi, aux, seed=0).loss != expected
    handle.remove()
    assert block._made.holds(block)
    assert fast(hsi, aux, seed=0).loss == expected


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_a_copy_watches_its_own_children(how, tmp_path):
    _, fast = models()
    if how == "copy":
        twin = copy.deepcopy(fast)
    else:
        torch.save(fast, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    twin.blocks[0].mlp.fc1.register_forward_hook(lambda module, args, out: out)
    assert fast.blocks[0]._made.holds(fast.blocks[0])
    assert not twin.blocks[0]._made.holds(twin.blocks[0])
    assert twin.blocks[1]._made.holds(twin.blocks[1])


def test_a_flop_counter_sees_the_block_that_runs_without_it():
    """The counter hooks all modules of the process to know which one runs, which changes no result."""
    from torch.utils.flop_counter import FlopCounterMode

    _, fast = models()
    hsi, aux = data()
    with FlopCounterMode(display=False) as counter:
        assert fast.blocks[0]._made.holds(fast.blocks[0])
        fast(hsi, aux, seed=0)
    assert counter.get_total_flops() > 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [*TREATMENTS, "another module for a block"])
def test_parameters_to_cast_are_found_whatever_was_changed(name):
    _, fast = models()
    if name in TREATMENTS:
        TREATMENTS[name](fast)
    else:
        for path in ("blocks.0", "decoder_blocks.1", "aux_encoders.ir", "conditioning.0", "decoder_embed"):
            replace(fast, path, nn.Sequential(fast.get_submodule(path)))
    known = {id(parameter) for parameter in fast.parameters()}
    found = [parameter for parameter in product_parameters(fast.product_layers(["ir"])) if parameter is not None]
    assert found
    assert all(id(parameter) in known for parameter in found)
