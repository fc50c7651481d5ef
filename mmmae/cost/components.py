"""The parts that a model's cost is reported by: which parameters, submodules and methods belong to which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..model.encoder import Backbone, HSIEncoder
from ..model.fast import FastModel
from ..model.reference import ReferenceEncoder, ReferenceModel

Model = FastModel | ReferenceModel
Encoder = HSIEncoder | ReferenceEncoder

# By the first part of a parameter's or submodule's name, or by a method's.
COMPONENTS = {
    "patch_embed": "patch_embed",
    "pos_embed_spatial": "patch_embed",
    "pos_embed_spectral": "patch_embed",
    "embed": "patch_embed",
    "aux_projections": "conditioning",
    "conditioning": "conditioning",
    "blocks": "blocks",
    "norm": "blocks",
    "decode": "decoder.embed",
    "decoder_embed": "decoder.embed",
    "mask_token": "decoder.embed",
    "decoder_pos_embed_spatial": "decoder.embed",
    "decoder_pos_embed_spectral": "decoder.embed",
    "decoder_blocks": "decoder.blocks",
    "decoder_norm": "decoder.blocks",
    "decoder_pred": "decoder.pred",
    "predict": "decoder.pred",
    "reconstruction_loss": "loss",
    "target": "loss",
    "contrast": "contrastive",
    "contrastive_head": "contrastive",
}
READ = ("patch_embed", "norm", "decoder_embed", "decoder_norm", "decoder_pred")  # not called by the fast model
METHODS = ("embed", "decode", "predict", "reconstruction_loss", "target", "contrast")


def component_of(name: str) -> str:
    """The component of a parameter, submodule or method of a model."""
    first, *rest = name.split(".")
    return f"aux_encoders.{rest[0]}" if first == "aux_encoders" else COMPONENTS[first]


def components_of(model: Model | Encoder) -> list[str]:
    """All components of a model, in the order in which a report lists them."""
    if isinstance(model, Encoder):
        return ["patch_embed", "blocks"]
    encoders = [f"aux_encoders.{name}" for name in model.config.aux]
    decoder = ["decoder.embed", "decoder.blocks", "decoder.pred"]
    return ["masking", "patch_embed", *encoders, "conditioning", "blocks", *decoder, "loss", "contrastive"]


def count_parameters(model: nn.Module) -> Counter[str]:
    """Parameters by component."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[component_of(name)] += parameter.numel()
    return counts


def blank_copy(model: Model) -> Model:
    """A model of the same config and backends, without memory."""
    with torch.device("meta"):
        if isinstance(model, FastModel):
            return FastModel(model.config, model.kernels, model.attention)
        return ReferenceModel(model.config, attention_of(model))


def attention_of(model: Model) -> str:
    """The attention backend that a model was made with."""
    if isinstance(model, FastModel):
        return model.attention
    backend = model.get_submodule("blocks.0.attn").attention
    assert isinstance(backend, str)
    return backend


class Traced(nn.Module):
    """A model that notes in `component` what it is busy with; tensors in, tensors out, as a tracer wants it.

    What stands between two steps of the forward pass counts to the step before; what stands before the first, checks of
    inputs included, to `masking`, or in an encoder to `patch_embed`.

    Args:
        model: its methods are replaced, and its parameters by ones that nobody has written; see `blank_copy`.
    """

    def __init__(self, model: Model | Encoder) -> None:
        super().__init__()
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape, device="cpu")))
        self.model = model
        self.start = self.component = components_of(model)[0]
        self.steps = nn.ModuleList()
        for owner, method, component, followed_by in list(_steps(model)):
            step = Step(getattr(owner, method), component, followed_by or component, self._enter)
            self.steps.append(step)
            setattr(owner, method, step.__call__)

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        """A volume, and for a whole model an image of each modality, of `batch` samples, that nobody has written."""
        config = self.model.config
        size = (config.image_size, config.image_size)
        hsi = torch.empty(batch, config.in_channels, config.bands, *size, device="cpu")
        channels = [] if isinstance(self.model, Encoder) else config.aux.values()
        return hsi, *(torch.empty(batch, count, *size, device="cpu") for count in channels)

    def forward(self, hsi: Tensor, *images: Tensor) -> tuple[Tensor, ...]:
        """What `inputs` gives -> tokens, or losses, prediction and latent."""
        self._enter(self.start)
        if isinstance(self.model, Encoder):
            return (self.model(hsi),)
        out = self.model(hsi, dict(zip(self.model.config.aux, images, strict=True)), seed=0)
        return out.loss, out.prediction, out.latent

    def _enter(self, component: str) -> None:
        self.component = component


class Step(nn.Module):
    """Stands in for a function of a model and tells which component it begins; a module, since tracers know those."""

    def __init__(
        self, function: Callable[..., Any], component: str, followed_by: str, enter: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.function, self.component, self.followed_by, self.enter = function, component, followed_by, enter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The function's own."""
        self.enter(self.component)
        result = self.function(*args, **kwargs)
        self.enter(self.followed_by)
        return result


def _steps(model: Model | Encoder) -> Iterator[tuple[nn.Module, str, str, str | None]]:
    """Owner, method, component, and the component of what follows if that is another one."""
    after = {"decode": "loss"} | ({"reconstruction_loss": "contrastive"} if model.config.aux else {})
    for method in METHODS:
        if hasattr(model, method):
            yield model, method, COMPONENTS[method], after.get(method)
    for name, child in model.named_children():
        members = child.named_children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [("", child)]
        for member, module in members:
            component = component_of(f"{name}.{member}")
            if not (isinstance(model, Backbone) and name in READ):
                yield module, "forward", component, "conditioning" if name == "aux_encoders" else None
