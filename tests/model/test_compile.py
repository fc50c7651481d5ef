"""The fast model under torch.compile: in one graph, for any batch size, with the numbers of eager mode."""

import pytest
import torch

import mmmae

SWITCHES = {
    "default": {},
    "a part decoded, pixels": {"decode_fraction": 0.5, "target": "pixels", "normalize_target": True},
    "dropout and checkpointing": {"conditioning_dropout": 0.2, "activation_checkpointing": True},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_dynamic_sizes_compile_in_one_graph(name):
    model = mmmae.fast_model("tiny", image_size=32, patch=(3, 8, 8), aux_patch=16, **SWITCHES[name])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True, fullgraph=True)
    for batch in (2, 3):
        generator = torch.Generator().manual_seed(batch)
        hsi = torch.randn(batch, 1, 12, 32, 32, generator=generator)
        aux = {name: torch.randn(batch, 1, 32, 32, generator=generator) for name in model.config.aux}
        losses, gradients = [], []
        for run in (model, compiled):
            model.zero_grad()
            loss = run(hsi, aux, seed=3).loss
            loss.backward()
            losses.append(loss.detach())
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(gradients[1], gradients[0])
