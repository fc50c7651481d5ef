"""Counting of multiply-adds, bytes and launches: of a forward pass by component, of a training step, of any function.

Floating point results are not computed, so that counting takes seconds and hardly any memory. What a GPU would run is
counted with tensors on the CPU too, see `gpu.on_gpu`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mmmae_kernels import use_backend
from mmmae_kernels.aot.costs import cost as launch_cost
from mmmae_kernels.attention.op import PLAIN
from mmmae_kernels.counting import launches_of

from ..model.encoder import Backbone
from ..model.layers import Attention, hooks_only_mark
from .components import Encoder, Model, Step, Traced
from .gpu import on_gpu
from .mac_formulas import ALLOCATIONS, MAC_FORMULAS, WITHOUT_MACS

COPIES, FILLS = ("aten::copy_", "aten::_foreach_copy_"), ("aten::fill_", "aten::zero_", "aten::_foreach_zero_")
CASTS = ("aten::_to_copy", *COPIES)
CHECKS = ("aten::aminmax",)

# PyTorch's kernels on lists of tensors (ATen/native/cuda/MultiTensorApply.cuh): a launch takes so many tensors, by the
# number of lists, and so many blocks of so many elements.
LISTS = ("aten::_foreach_", "aten::_fused_")
TENSORS_OF_LISTS = (110, 64, 48, 36, 30)
BLOCKS_OF_LISTS, ELEMENTS_OF_BLOCK = 320, 65536

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

    from mmmae_kernels.gpu.config import Launch


@dataclasses.dataclass
class Cost:
    """The cost of operators.

    Args:
        macs: multiply-adds of matrix products, convolutions and attention. Norms, softmax, activations, interpolation
            and reductions are not counted.
        bytes: size of the inputs and outputs of every launch. Each element of a tensor counts once, even if it is in a
            cache or a gather does not read it.
        launches: number of ATen and custom operators that write memory; views and allocations do not count.
    """

    macs: int = 0
    bytes: int = 0
    launches: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.bytes + other.bytes, self.launches + other.launches)


class Operator(NamedTuple):
    """An operator of PyTorch or a kernel of ours that launched something.

    Args:
        name: `aten::mm` for instance, or the name of a Triton kernel.
        cost: what it costs.
        component: the component of the model that it belongs to, in backward too; empty if that is not known.
        is_cast: whether it only converts from one floating point type to another.
    """

    name: str
    cost: Cost
    component: str = ""
    is_cast: bool = False


@dataclasses.dataclass
class StepCost:
    """The cost of a training step.

    Args:
        saved_bytes: memory kept from the forward for the backward pass: distinct storages, without those of parameters.
        operators: each operator of both passes that launches something, in order.
    """

    saved_bytes: int
    operators: list[Operator]

    @property
    def total(self) -> Cost:
        """The cost of both passes."""
        return total(self.operators)

    @property
    def launches(self) -> int:
        """The launches of both passes."""
        return self.total.launches

    @property
    def casts(self) -> int:
        """The launches of both passes that only convert from one floating point type to another."""
        return total(operator for operator in self.operators if operator.is_cast).launches


def total(operators: Iterable[Operator]) -> Cost:
    """Return the cost of some operators together."""
    return sum((operator.cost for operator in operators), Cost())


def count(model: Model | Encoder, batch: int) -> dict[str, Cost]:
    """Count the forward pass of `batch` samples with all modalities, by component, in float32, as run on the CPU.

    Multiply-adds are counted by PyTorch's counter and, where it is installed, by fvcore's.

    Args:
        model: it can't be used afterwards, see `Traced`.
        batch: number of samples.

    Raises:
        RuntimeError: the multiply-adds of an operator are unknown, or the two counters disagree.
    """
    traced = Traced(model)
    inputs = traced.inputs(batch)
    costs = _count_by_torch(traced, inputs)
    if importlib.util.find_spec("fvcore") is None:
        return costs
    by_fvcore = _count_by_fvcore(traced, inputs)
    for component in sorted({*costs, *by_fvcore}):
        by_torch = costs[component].macs if component in costs else 0
        if by_torch != by_fvcore[component]:
            raise RuntimeError(
                f"{component}: torch counts {by_torch} multiply-adds and fvcore {by_fvcore[component]}, expected the "
                "same; one of them lacks the formula of an operator, see mmmae.cost.mac_formulas"
            )
    return costs


def count_step(model: Model, batch: int, *, autocast: torch.dtype | None = None, target: str | None = None) -> StepCost:
    """Count a training step of `batch` samples, without its optimizer.

    Args:
        model: it can't be used afterwards, see `Traced`.
        batch: number of samples.
        autocast: dtype of the forward pass under autocast; None for none.
        target: architecture of a GPU, for example `sm90`, to count what it would run; None counts what this machine
            runs. A fast model for a GPU has kernels `triton` and attention `gpu.ATTENTION`, or `sdpa` in float32.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    traced = Traced(model)
    inputs = traced.inputs(batch)

    def step() -> None:
        mixed = torch.autocast("cpu", autocast, enabled=autocast is not None)
        with mixed, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, *_ = traced(*inputs)
        loss.backward()

    operators = count_operators(step, traced, target)
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved = sum(storage.nbytes() for key, storage in storages.items() if key not in parameters)
    return StepCost(saved, operators)


def count_operators(
    function: Callable[[], object], traced: Traced | None = None, target: str | None = None
) -> list[Operator]:
    """Return each operator in a function that launches something, in order.

    Args:
        function: what to count.
        traced: the model that the function runs, whose components the operators are of; None if there is none.
        target: see `count_step`.
    """
    uncomputed, launches = Uncomputed(), Launches(traced, on_gpu=target is not None)  # type: ignore[no-untyped-call]
    gpu = contextlib.nullcontext() if target is None else on_gpu(target, launches.receive)
    with gpu, hooks_only_mark(), uncomputed, launches:
        function()
    return launches.operators


def flop_counter() -> FlopCounterMode:
    """Make a silent FLOP counter of torch with all formulas; it counts two operations for a multiply-add."""
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton, which takes a while

    formulas = {}
    for name, formula in MAC_FORMULAS.items():
        namespace, operator = name.split("::")
        if hasattr(getattr(torch.ops, namespace), operator):
            formulas[getattr(getattr(torch.ops, namespace), operator)] = _as_flops(formula)
    return FlopCounterMode(display=False, custom_mapping=formulas)


class Uncomputed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode in which operators return uninitialised floating point tensors of the right shape, without computing them.

    The system gives no memory to tensors that are never written. The model still sees tensors on the CPU, and integers
    and booleans, such as token numbers and presence, are computed.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _has_floating((args, kwargs)) or not _does_work(func):
            return func(*args, **kwargs)
        changed = _changed(func, args, kwargs)
        only_changes = not func._schema.returns or _returns_an_argument(func)
        if only_changes and changed and all(tensor.is_floating_point() for tensor in changed):
            return (None, changed[0], changed)[min(len(func._schema.returns), 2)]
        if _returns_an_argument(func):
            return func(*args, **kwargs)
        meta_args, meta_kwargs = tree_map(functools.partial(_unwritten, device="meta"), (args, kwargs))
        result = func(*meta_args, **meta_kwargs)
        if not _has_floating(result):
            return func(*args, **kwargs)
        return tree_map(functools.partial(_unwritten, device="cpu"), result)


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that records in `operators` each operator that writes memory.

    Args:
        traced: the model that runs, if any.
        on_gpu: whether to leave out the checks of token numbers, which only a CPU makes.

    Raises:
        RuntimeError: the multiply-adds of an operator are unknown. Those of ATen without a formula count as 0.
    """

    def __init__(self, traced: Traced | None = None, *, on_gpu: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.formulas = flop_counter().flop_registry
        self.traced, self.on_gpu = traced, on_gpu
        self.operators: list[Operator] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        written = _tensors(result) or _changed(func, args, kwargs)
        if written and _does_work(func) and not (self.on_gpu and name in CHECKS):
            moved = sum(map(_bytes, _read(name, args, kwargs) + written))
            cost = Cost(self._macs(func, args, kwargs, result), moved, _launches(name, args))
            self.book(Operator(name, cost, self.component, _is_cast(name, args, written)))
        return result

    def receive(self, launch: Launch) -> None:
        """Record the launch of a Triton kernel."""
        operations, moved = launch_cost(launch)
        macs = operations // 2 if "P" in launch.arguments else 0  # P is the length of the sums of our matrix products
        self.book(Operator(launch.kernel.fn.__name__, Cost(macs, moved, 1), self.component))

    def book(self, operator: Operator) -> None:
        """Record an operator."""
        self.operators.append(operator)

    @property
    def component(self) -> str:
        """The component that is running, in backward too; empty without a model."""
        return "" if self.traced is None else self.traced.running()

    def is_without_macs(self, func: Any) -> bool:
        """Return whether an operator without a formula has no multiply-adds."""
        return bool(func.namespace == "aten")

    def _macs(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            return int(formula(*args, **kwargs, out_val=result)) // 2
        if self.is_without_macs(func):
            return 0
        raise RuntimeError(
            f"the multiply-adds of {func._schema.name} are unknown: add a formula to "
            "mmmae.cost.mac_formulas.MAC_FORMULAS, or the operator's name to WITHOUT_MACS"
        )

    @property
    def count(self) -> int:
        """The number of launches."""
        return total(self.operators).launches


class Ledger(Launches):  # type: ignore[no-untyped-call]
    """A mode that adds up the costs of a forward pass by component.

    Args:
        traced: the model, which says which component is running.
    """

    def __init__(self, traced: Traced) -> None:
        super().__init__(traced)
        self.by_component: defaultdict[str, Cost] = defaultdict(Cost)

    def book(self, operator: Operator) -> None:
        """Add a cost to those of the component that is running."""
        self.by_component[operator.component] += operator.cost

    def is_without_macs(self, func: Any) -> bool:
        """Return whether the operator is listed or pointwise: a forward pass has few enough operators to list."""
        namespace, name = func._schema.name.split("::")
        return namespace == "aten" and (torch.Tag.pointwise in func.tags or name in WITHOUT_MACS)


def _count_by_torch(traced: Traced, inputs: tuple[Tensor, ...]) -> dict[str, Cost]:
    uncomputed = Uncomputed()  # type: ignore[no-untyped-call]
    with uncomputed, torch.no_grad(), Ledger(traced) as ledger:
        traced(*inputs)
    return dict(ledger.by_component)


def _as_flops(formula: Callable[..., int]) -> Callable[..., int]:
    def flops(*shapes: Any, out_shape: object = None, **options: object) -> int:
        return 2 * formula(*shapes)

    return flops


def _count_by_fvcore(traced: Traced, inputs: tuple[Tensor, ...]) -> Counter[str]:
    """Count multiply-adds by component, without those that fvcore counts for norms and interpolation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it compiles losses at import, which are not used here
        from fvcore.nn import FlopCountAnalysis, jit_handles

    current = traced.start

    def booked(macs_of: Callable[[list[Any], list[Any]], Any]) -> Callable[[list[Any], list[Any]], Counter[str]]:
        def macs(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
            nonlocal current
            # The graph is in the order of execution, and each node has the names of the modules that it ran in.
            scopes = [scope for scope in outputs[0].node().scopeName().split("/") if scope.startswith("steps.")]
            if scopes:
                step = traced.get_submodule(scopes[-1])
                assert isinstance(step, Step)
                current = step.component
            counted = macs_of(inputs, outputs)
            return Counter({current: sum(counted.values()) if isinstance(counted, Counter) else counted})

        return macs

    handles = {
        "aten::_convolution": jit_handles.conv_flop_jit,
        "aten::addmm": jit_handles.addmm_flop_jit,
        "aten::bmm": jit_handles.bmm_flop_jit,
        "aten::linear": jit_handles.linear_flop_jit,
        "aten::matmul": jit_handles.matmul_flop_jit,
        "aten::mm": jit_handles.matmul_flop_jit,
    } | {name: _as_handle(formula) for name, formula in MAC_FORMULAS.items()}
    if isinstance(traced.model, Backbone):
        traced.model.kernels = "auto"
    for name, module in traced.named_modules():
        is_read = isinstance(traced.model, Backbone) and "patch_embed" in name.split(".")
        if isinstance(module, (nn.Conv2d, nn.Conv3d)) and not is_read:
            setattr(module, "forward", functools.partial(_convolve, module))  # noqa: B010
        if isinstance(module, Attention) and module.backend not in PLAIN:
            module.backend = "sdpa"
    # The reference implementations: the tracer can't record operators with lists, whose formulas these check.
    uncomputed = Uncomputed()  # type: ignore[no-untyped-call]
    with uncomputed, torch.no_grad(), use_backend("eager"), hooks_only_mark():
        analysis = FlopCountAnalysis(traced, inputs).clear_op_handles()
        analysis.set_op_handle(**{name: booked(handle) for name, handle in handles.items()})
        # An operator that fvcore does not know shows as a disagreement, and not every model calls every step.
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        counts: Counter[str] = analysis.by_operator()
    return counts


def _convolve(layer: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Apply a convolution by the only operator for it that the tracer records under a dispatch mode."""
    assert not isinstance(layer.padding, str)
    sizes = (layer.stride, layer.padding, layer.dilation, False, layer.output_padding, layer.groups)
    return torch._convolution(x, layer.weight, layer.bias, *sizes, False, False, False, False)


def _as_handle(formula: Callable[..., int]) -> Callable[[list[Any], list[Any]], int]:
    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        return formula(*map(_shape_or_constant, inputs))

    return handle


def _shape_or_constant(value: Any) -> Any:
    if value.isCompleteTensor():
        return value.type().sizes()
    if value.node().kind() == "prim::ListConstruct":
        return [_shape_or_constant(item) for item in value.node().inputs()]
    return value.toIValue()


def _does_work(func: Any) -> bool:
    namespace, name = func._schema.name.split("::")
    return not func.is_view and not (namespace == "aten" and name in ALLOCATIONS)


def _returns_an_argument(func: Any) -> bool:
    return any(returned.alias_info is not None for returned in func._schema.returns)


def _changed(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that an operator writes to."""
    if not func._schema.is_mutable:
        return []
    given = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs  # noqa: B905
    return _tensors([
        given.get(argument.name)
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ])  # fmt: skip


def _read(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operator reads; of some the first is only an example, or only written."""
    skipped = name in (*COPIES, *FILLS) or name.startswith("aten::new_") or name.endswith("_like")
    return _tensors((args[1:] if skipped else args, kwargs))


def _launches(name: str, args: Sequence[Any]) -> int:
    """Return the number of kernels that an operator launches; those of torch's lists hold some of its tensors each."""
    if not name.startswith(LISTS):
        return launches_of(name, args)
    lists = [argument for argument in args if isinstance(argument, (list, tuple)) and _tensors(argument)]
    depth = len(lists) - name.startswith("aten::_fused_")  # the steps of an optimizer lie beside the lists
    most = TENSORS_OF_LISTS[min(depth, len(TENSORS_OF_LISTS)) - 1]
    launches = tensors = blocks = 0
    for tensor in lists[0]:
        tensors += 1
        for left in reversed(range(-(-tensor.numel() // ELEMENTS_OF_BLOCK))):
            blocks += 1
            if blocks == BLOCKS_OF_LISTS or (tensors == most and left == 0):
                launches, tensors, blocks = launches + 1, min(left, 1), 0
    return launches + (blocks > 0)


def _is_cast(name: str, args: Sequence[Any], written: Sequence[Tensor]) -> bool:
    """Return whether an operator converts floating point numbers to another floating point type."""
    if name not in CASTS:
        return False
    sources = _tensors(args[1:] if name in COPIES else args[:1])
    pairs = zip(sources, written, strict=False)
    return any(a.dtype != b.dtype and a.is_floating_point() and b.is_floating_point() for a, b in pairs)


def _unwritten(leaf: Any, device: str) -> Any:
    """Return an uninitialised tensor like this one on `device`; replace a device by it, and leave other values."""
    if isinstance(leaf, Tensor):
        return torch.empty_like(leaf, device=device)
    return torch.device(device) if isinstance(leaf, torch.device) else leaf


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _has_floating(tree: Any) -> bool:
    return any(tensor.is_floating_point() for tensor in _tensors(tree))


def _bytes(tensor: Tensor) -> int:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in sizes if stride != 0)
