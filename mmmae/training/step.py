"""A training step that never waits for the device, and is replayed as one CUDA graph on a GPU."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
import weakref
from collections.abc import Hashable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_whole
from .figures import Figures, StepFigures
from .graph import CUDA_GRAPH_CHOICES, CaptureError, GraphedCall, GraphRecorder, graph_refuses

NORM_EPSILON = 1e-6  # added to the norm that clipping divides by, as `torch.nn.utils.clip_grad_norm_` does
SHAPES = 8  # different shapes of batches that are recorded; batches of further shapes run without a graph

Arguments = tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor], Tensor | None]


class TrainingStep:
    """Trains a model, one batch a call: forward, backward, clipping and optimizer, without waiting for the device.

    On a GPU the first calls run normally; then a whole call is recorded as a CUDA graph, which later calls replay. A
    batch of other shapes, or with other images, gets a recording of its own. On other devices calls run without a
    graph. The seed of the masks advances on the device, and losses are kept there until `read`.

    If the loss or gradient of a step is NaN or infinite, neither this step nor any after it changes weights or
    optimizer state, until `clear` is called; `read` tells which step it was.

    A recording reads and writes parameters, buffers and optimizer state where they are in memory: change them in place,
    as `load_state_dict` of a model does. A new recording is made after `load_state_dict` of the optimizer, and when
    hyperparameters of the optimizer (weight decay, betas), `clip`, or the set of trained parameters change. After any
    other change to what a step does (a hook, an adapter, other kernels), call `reset`.

    Args:
        model: called as `model(hsi, aux, present, valid, seed=seed)`, returns an `mmmae.Output`.
        optimizer: `torch.optim.AdamW` or `Adam` with `fused=True`, over parameters on one device. Its kernel applies
            the clip factor and skips a step that is not finite, so neither takes a pass of its own over the gradients.
        clip: largest norm of the gradient over all of the optimizer's parameters; None does not clip.
        accumulate: number of calls whose mean gradient makes one step. If above 1, every parameter has a gradient, zero
            if no call of the step used it.
        autocast: `torch.bfloat16` to run the forward pass under autocast, or None.
        seed: seed of the first call's mask; each call adds 1.
        read_every: number of steps whose figures are kept for `read`.
        cuda_graph: `auto` records if that is possible, `on` raises if it is not, `off` never records.

    Attributes:
        graph_refused: the reason why nothing is recorded, or None.
        latent: visible tokens `[B, K, D]` of the last call, valid until the next one.

    Raises:
        ValueError: an argument is not allowed, or `cuda_graph` is `on` and steps can't be recorded.

    Example:
        >>> import mmmae
        >>> import torch
        >>> from mmmae.data import collate
        >>> from mmmae.phantom import Phantom
        >>> subjects = Phantom(4, image_size=32)
        >>> batch = collate([subjects[i] for i in range(4)], subjects.modalities)
        >>> model = mmmae.fast_model("tiny", image_size=32, aux=subjects.modalities)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        >>> step = mmmae.TrainingStep(model, optimizer, clip=1.0)
        >>> for _ in range(3):
        ...     complete = step(batch.hsi, batch.aux, batch.present, batch.valid)
        >>> [(figures.step, figures.finite) for figures in step.read()]
        [(0, True), (1, True), (2, True)]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None = None,
        accumulate: int = 1,
        autocast: torch.dtype | None = None,
        seed: int = 0,
        read_every: int = 50,
        cuda_graph: str = "auto",
    ) -> None:
        for name, count in (("accumulate", accumulate), ("read_every", read_every)):
            check_whole(name, count, 1)
        if clip is not None and not 0 < clip < math.inf:
            raise ValueError(f"clip is {clip}, expected a number > 0, or None")
        if autocast not in (None, torch.bfloat16):
            scaler = ", which needs a loss scaler" if autocast == torch.float16 else ""
            raise ValueError(f"autocast is {autocast}{scaler}, expected torch.bfloat16 or None")
        check_choice("cuda_graph", cuda_graph, CUDA_GRAPH_CHOICES)
        self.device = _check_optimizer(optimizer)
        self.model, self.optimizer, self.clip, self.accumulate = model, optimizer, clip, accumulate
        self.autocast, self.cuda_graph = autocast, cuda_graph
        self.graph_refused = "cuda_graph is 'off'" if cuda_graph == "off" else graph_refuses(self.device)
        if cuda_graph == "on" and self.graph_refused is not None:
            raise ValueError(f"cuda_graph is 'on', but {self.graph_refused}; expected 'auto' or 'off'")
        self.figures = Figures(self.device, read_every, accumulate)
        self.latent: Tensor
        self._gradients: dict[Tensor, Tensor] = {}  # by parameter, if several calls add to them
        self._seed = torch.zeros((), dtype=torch.int64, device=self.device)
        self.set_seed(seed)
        # A learning rate changes from step to step, so a graph reads it from the device. On the CPU it is a number.
        groups = optimizer.param_groups if self.device.type != "cpu" else []
        self._rates = [torch.zeros((), device=self.device) for _ in groups]
        self._passes = 0  # of the step so far
        self._recorder: GraphRecorder | None = None
        self._inputs: dict[Hashable, dict[str, Tensor]] = {}
        self._calls: dict[Hashable, GraphedCall[Tensor]] = {}
        ours = weakref.ref(self)  # the optimizer must not keep a step that nobody needs
        optimizer.register_load_state_dict_post_hook(lambda _: _reset(ours()))

    def __call__(
        self,
        hsi: Tensor,
        aux: Mapping[str, Tensor | None] | None = None,
        present: Mapping[str, Tensor] | None = None,
        valid: Tensor | None = None,
    ) -> bool:
        """Train on a batch, which may be on the host; from page-locked memory it is copied without waiting.

        Args:
            hsi, aux, present, valid: as for the model.

        Returns:
            True if the call completed a step, in which the optimizer ran.

        Raises:
            ValueError: an input does not fit the model.
            RuntimeError: `cuda_graph` is `on` and the step can't be recorded.
        """
        first, last = self._passes == 0, self._passes == self.accumulate - 1
        for rate, group in zip(self._rates, self.optimizer.param_groups, strict=False):
            if last and not self._is_on_device(group["lr"]):
                rate.fill_(float(group["lr"]))
        given = _by_name(hsi, aux, present, valid)
        call = self._recorded(given, present or {}, first, last)
        if call is None:
            moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in given.items()}
            self.latent = self._run(_as_arguments(moved, present or {}), first, last)
        else:
            try:
                self.latent = call()
            except CaptureError as error:
                self._give_up(error)
                return self(hsi, aux, present, valid)
        self._passes = (self._passes + 1) % self.accumulate
        if last:
            self.figures.count()
        return last

    def read(self) -> list[StepFigures]:
        """Return the figures of the steps since the last call, at most `read_every`; waits for the device."""
        return self.figures.read()

    def clear(self) -> None:
        """Resume training after a step that was not finite."""
        self.figures.clear()

    def set_seed(self, seed: int) -> None:
        """Set the seed of the next call's mask.

        Raises:
            ValueError: the seed is negative or not below 2^63.
        """
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}, expected 0..2^63-1")
        self._seed.fill_(seed)

    def reset(self) -> None:
        """Discard the recordings; the next calls make new ones."""
        self._calls.clear()
        self._inputs.clear()
        self._recorder = None

    def _run(self, arguments: Arguments, first: bool, last: bool) -> Tensor:
        """Run the part of a call on the device; return the latent."""
        if first:
            self._begin_gradients()
        with contextlib.nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast):
            output = self.model(*arguments, seed=self._seed)
        loss = output.loss if self.accumulate == 1 else output.loss / self.accumulate
        loss.backward()
        self._seed.add_(1)
        self.figures.add_pass(output, first=first)
        if last:
            self._update()
        latent: Tensor = output.latent.detach()
        return latent

    def _begin_gradients(self) -> None:
        """Set gradients to None, or to zero in place if several calls of a step add to them."""
        parameters = self._trained()
        if self.accumulate == 1:
            for parameter in parameters:
                parameter.grad = None
            return
        for parameter in parameters:
            if parameter not in self._gradients:
                self._gradients[parameter] = torch.zeros_like(parameter)
            parameter.grad = self._gradients[parameter]
        torch._foreach_zero_([self._gradients[parameter] for parameter in parameters])

    def _trained(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _is_on_device(self, rate: float | Tensor) -> bool:
        return isinstance(rate, Tensor) and rate.device == self.device

    def _update(self) -> None:
        gradients = [parameter.grad for parameter in self._trained() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.figures.close(norm)
        # Fused optimizers divide gradients by grad_scale as they read them, and do nothing where found_inf is 1.
        divisor = None if self.clip is None else clip_divisor(norm, self.clip)
        with self._device_rates(), scaled(self.optimizer, divisor, self.figures.broken):
            self.optimizer.step()

    @contextlib.contextmanager
    def _device_rates(self) -> Iterator[None]:
        """Let the optimizer read its learning rates from the device, so that it can be recorded."""
        groups = self.optimizer.param_groups
        kept = [(group["lr"], group["capturable"]) for group in groups]
        for rate, group in zip(self._rates, groups, strict=False):
            group["lr"] = group["lr"] if self._is_on_device(group["lr"]) else rate
            group["capturable"] = True
        try:
            yield
        finally:
            for group, (rate, capturable) in zip(groups, kept, strict=True):
                group["lr"], group["capturable"] = rate, capturable

    def _recorded(
        self, given: dict[str, Tensor], present: Mapping[str, Tensor], first: bool, last: bool
    ) -> GraphedCall[Tensor] | None:
        """Copy a batch to the inputs of a recording for its shapes and return that, or None if none is to be made."""
        if self.graph_refused is not None:
            return None
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in given.items())
        if shapes not in self._inputs:
            if len(self._inputs) == SHAPES:
                return None
            self._inputs[shapes] = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
                for name, tensor in given.items()
            }
        inputs = self._inputs[shapes]
        for name, tensor in given.items():
            inputs[name].copy_(tensor, non_blocking=True)
        key = (shapes, self.model.training, first, last, self.clip, *self._numbers())
        if key not in self._calls:
            self._recorder = self._recorder or GraphRecorder(self.device)
            run = functools.partial(self._run, _as_arguments(inputs, present), first, last)
            self._calls[key] = GraphedCall(run, self._recorder)
        return self._calls[key]

    def _numbers(self) -> Iterator[Hashable]:
        """Yield values that a recording contains: the optimizer's numbers, and which parameters are trained."""
        for group in self.optimizer.param_groups:
            yield tuple((name, value) for name, value in group.items() if name not in ("params", "lr", "initial_lr"))
            yield tuple(parameter.requires_grad for parameter in group["params"])

    def _give_up(self, error: CaptureError) -> None:
        if self.cuda_graph == "on":
            raise RuntimeError(f"cuda_graph is 'on', but the step can't be recorded: {error}") from error
        self.graph_refused = f"a step could not be recorded: {error}"
        warnings.warn(f"training continues without a CUDA graph: {self.graph_refused}", stacklevel=3)
        self.reset()


def _reset(step: TrainingStep | None) -> None:
    if step is not None:
        step.reset()


def clip_divisor(norm: Tensor, clip: float) -> Tensor:
    """Return the scalar, at least 1, by which to divide gradients of this norm so that it is at most `clip`."""
    return ((norm + NORM_EPSILON) / clip).clamp(min=1)


@contextlib.contextmanager
def scaled(optimizer: torch.optim.Optimizer, divisor: Tensor | None, broken: Tensor) -> Iterator[None]:
    """Let a fused optimizer divide gradients by a scalar, and do nothing if `broken` is 1, as GradScaler does."""
    optimizer.grad_scale, optimizer.found_inf = divisor, broken  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def _by_name(
    hsi: Tensor, aux: Mapping[str, Tensor | None] | None, present: Mapping[str, Tensor] | None, valid: Tensor | None
) -> dict[str, Tensor]:
    """Return the tensors of a batch by name; flags of modalities without an image are left out."""
    images = {name: image for name, image in (aux or {}).items() if image is not None}
    flags = {f"present.{name}": has for name, has in (present or {}).items() if name in images}
    tensors = {"hsi": hsi, **{f"aux.{name}": image for name, image in images.items()}, **flags}
    return tensors if valid is None else {**tensors, "valid": valid}


def _as_arguments(tensors: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Arguments:
    """Undo `_by_name`, and add the flags of modalities without an image."""
    aux = {name.removeprefix("aux."): image for name, image in tensors.items() if name.startswith("aux.")}
    flags = {name: tensors.get(f"present.{name}", has) for name, has in present.items()}
    return tensors["hsi"], {**aux}, flags, tensors.get("valid")


def _check_optimizer(optimizer: torch.optim.Optimizer) -> torch.device:
    """Return the device of the optimizer's parameters; raise ValueError if it can't be used."""
    if not isinstance(optimizer, torch.optim.Adam) or not all(group["fused"] for group in optimizer.param_groups):
        adam = " without fused=True" if isinstance(optimizer, torch.optim.Adam) else ""
        raise ValueError(
            f"optimizer is {type(optimizer).__name__}{adam}, which takes no clip factor and no finite flag from the "
            "device; expected torch.optim.AdamW(..., fused=True)"
        )
    from torch.distributed.tensor import DTensor  # slow to import

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        raise ValueError("the optimizer's parameters are DTensors; expected whole tensors, not shared among processes")
    devices = sorted({str(parameter.device) for parameter in parameters})
    if len(devices) != 1:
        raise ValueError(f"the optimizer's parameters are on the devices {', '.join(devices)}; expected one device")
    return torch.device(devices[0])
