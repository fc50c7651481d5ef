"""Components of a model in its cost report, and which parameters, submodules and methods belong to each."""

from __future__ import annotations

import bisect
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

# Keys are the first part of the name of a parameter or submodule, or the name of a method.
COMPONENTS = {
    "patch_embed": "patch_embed",
    "pos_embed_spatial": "patch_embed",
    "pos_embed_spectral": "patch_embed",
    "embed": "patch_embed",
    "encode_images": "aux_encoders",  # of encoders that are computed as one; else each is a component
    "aux_projections": "conditioning",
    "project_vectors": "conditioning",
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
# The fast model reads the weights of these modules and does not call them.
READ = ("patch_embed", "norm", "aux_projections", "decoder_embed", "decoder_norm", "decoder_pred", "contrastive_head")
METHODS: tuple[str, ...] = ("embed", "encode_images", "project_vectors", "decode", "predict")
METHODS += ("reconstruction_loss", "target", "contrast")


def component_of(name: str) -> str:
    """Return the component of a parameter, submodule or method of a model."""
    first, *rest = name.split(".")
    return f"aux_encoders.{rest[0]}" if first == "aux_encoders" else COMPONENTS[first]


def components_of(model: Model | Encoder) -> list[str]:
    """Return all components of a model, in the order in which a report lists them."""
    if isinstance(model, Encoder):
        return ["patch_embed", "blocks"]
    encoders = [f"aux_encoders.{name}" for name in model.config.aux]
    decoder = ["decoder.embed", "decoder.blocks", "decoder.pred"]
    return ["masking", "patch_embed", *encoders, "conditioning", "blocks", *decoder, "loss", "contrastive"]


def count_parameters(model: nn.Module) -> Counter[str]:
    """Count parameters by component."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[component_of(name)] += parameter.numel()
    return counts


def blank_copy(model: Model) -> Model:
    """Make a model of the same config and backends on the meta device, without memory."""
    with torch.device("meta"):
        if isinstance(model, FastModel):
            return FastModel(model.config, model.kernels, model.attention)
        return ReferenceModel(model.config, attention_of(model))


def attention_of(model: Model) -> str:
    """Return the attention backend that a model was made with."""
    if isinstance(model, FastModel):
        return model.attention
    backend = model.get_submodule("blocks.0.attn").attention
    assert isinstance(backend, str)
    return backend


class Traced(nn.Module):
    """A model that records in `component` which component is running, with tensors as arguments and results.

    Work between two steps of the forward pass belongs to the earlier step. Work before the first step, with the checks
    of inputs, belongs to `masking`, or in an encoder to `patch_embed`.

    Args:
        model: its methods are replaced, and its parameters too, by uninitialised ones; see `blank_copy`.
    """

    def __init__(self, model: Model | Encoder) -> None:
        super().__init__()
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module.register_parameter(name, nn.Parameter(torch.empty(parameter.shape, device="cpu")))
        self.model = model
        self.start = self.component = components_of(model)[0]
        self._changes: list[tuple[int, str]] = []  # the number of the next autograd node, and the component from there
        self._owners = {id(parameter): component_of(name) for name, parameter in model.named_parameters()}
        self.steps = nn.ModuleList()
        for owner, method, component, followed_by in list(_steps(model)):
            step = Step(getattr(owner, method), component, followed_by or component, self._enter)
            self.steps.append(step)
            setattr(owner, method, step.__call__)

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        """Make uninitialised inputs of `batch` samples: a volume and, for a whole model, an image of each modality."""
        config = self.model.config
        size = (config.image_size, config.image_size)
        hsi = torch.empty(batch, config.in_channels, config.bands, *size, device="cpu")
        channels = [] if isinstance(self.model, Encoder) else config.aux.values()
        return hsi, *(torch.empty(batch, count, *size, device="cpu") for count in channels)

    def forward(self, hsi: Tensor, *images: Tensor) -> tuple[Tensor, ...]:
        """Run the model on what `inputs` returns; return its tokens, or loss, prediction and latent."""
        self._enter(self.start)
        if isinstance(self.model, Encoder):
            return (self.model(hsi),)
        out = self.model(hsi, dict(zip(self.model.config.aux, images, strict=True)), seed=0)
        return out.loss, out.prediction, out.latent

    def running(self) -> str:
        """Return the component that runs; in backward, the one whose forward pass made the autograd node."""
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return self.component
        if hasattr(node, "variable"):  # adds to the gradient of a parameter
            return self._owners[id(node.variable)]
        change = bisect.bisect_right(self._changes, node._sequence_nr(), key=lambda change: change[0])
        return self._changes[change - 1][1]

    def _enter(self, component: str) -> None:
        self.component = component
        number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self._changes.append((number, component))


class Step(nn.Module):
    """A function of a model that reports which component it begins; a module, because tracers record the module names.

    Args:
        function: the method to call.
        component: that the function belongs to.
        followed_by: the component of the work after it.
        enter: called with the name of a component when it begins.
    """

    def __init__(
        self, function: Callable[..., Any], component: str, followed_by: str, enter: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.function, self.component, self.followed_by, self.enter = function, component, followed_by, enter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        self.enter(self.component)
        result = self.function(*args, **kwargs)
        self.enter(self.followed_by)
        return result


def _steps(model: Model | Encoder) -> Iterator[tuple[nn.Module, str, str, str | None]]:
    """Yield owner, method and component of each step, and the component of the work after it if it is another one."""
    after = {"decode": "loss"}
    if model.config.aux:
        after |= {"encode_images": "conditioning", "reconstruction_loss": "contrastive"}
    for method in METHODS:
        if hasattr(model, method):
            yield model, method, COMPONENTS[method], after.get(method)
    for name, child in model.named_children():
        members = child.named_children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [("", child)]
        for member, module in members:
            component = component_of(f"{name}.{member}")
            if not (isinstance(model, Backbone) and name in READ):
                yield module, "forward", component, "conditioning" if name == "aux_encoders" else None
