"""The fast model under torch.compile: in one graph, for any batch size, with the numbers of eager mode.

tests/soak/test_compile.py traces it with more losses, and with all sizes unknown, which takes longer.
"""

import pytest
import torch

import mmmae

pytestmark = pytest.mark.xdist_group("compile")  # one process loads the compiler
SMALL = {"image_size": 32, "patch": (3, 8, 8), "aux_patch": 16, "depth": 1, "aux": {"ir": 1}}
SWITCHES = {
    "decode_fraction": 0.5,
    "target": "pixels",
    "normalize_target": True,
    "conditioning_dropout": 0.2,
    "activation_checkpointing": True,
}


@pytest.fixture(autouse=True)
def _compiles_anew():
    """Compile nothing for other tests, and keep nothing that was compiled."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batch_of(size, names):
    """Return a batch whose first sample lacks an image."""
    generator = torch.Generator().manual_seed(size)
    hsi = torch.randn(size, 1, 12, 32, 32, generator=generator)
    aux = {name: torch.randn(size, 1, 32, 32, generator=generator) for name in names}
    valid = torch.rand(size, 32, 32, generator=generator) > 0.2
    return hsi, aux, {"ir": torch.arange(size) > 0}, valid


def check_compiled(dynamic=None, **fields):
    """Compile a small model for any batch size, and compare losses and gradients of two sizes with eager mode.

    Args:
        dynamic: whether all other sizes are unknown too.
        fields: of the model's config.
    """
    torch.manual_seed(0)
    model = mmmae.fast_model("tiny", **{**SMALL, **fields})
    compiled = mmmae.fast_model(model)
    compiled.compile(backend="aot_eager", dynamic=dynamic, fullgraph=True)
    assert set(compiled.state_dict()) == set(model.state_dict())
    for size in (2, 3):
        batch = hsi, aux, present, valid = batch_of(size, model.config.aux)
        for tensor in (hsi, *aux.values(), *present.values(), valid):
            torch._dynamo.mark_dynamic(tensor, 0)  # a graph for one size alone is an error
        losses, gradients = [], []
        for run in (model, compiled):
            model.zero_grad()
            loss = run(*batch, seed=3).loss
            loss.backward()
            losses.append(loss.detach())
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(gradients[1], gradients[0])


def test_a_model_with_all_switches_compiles_in_one_graph_for_any_size():
    check_compiled(**SWITCHES)
