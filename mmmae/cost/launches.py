"""Modes that count the multiply-adds, bytes and launches of operators, which need not be computed for it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from mmmae_kernels.aot.costs import cost as launch_cost
from mmmae_kernels.counting import launches_of

from .components import Traced
from .costs import Cost, Operator, total
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
    and booleans, such as token numbers and presence, are computed. The shapes that a call returns are kept for others
    like it: torch derives shapes in Python, which takes most of the time, and the blocks of a model are alike.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._results: dict[Any, Any] = {}  # call -> its result on the meta device

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
        call = func, _signature(args), _signature(kwargs)
        if call not in self._results:
            meta_args, meta_kwargs = tree_map(_on_meta, (args, kwargs))
            self._results[call] = func(*meta_args, **meta_kwargs)
        result = self._results[call]
        if not _has_floating(result):
            return func(*args, **kwargs)
        return _unwritten(result)


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


def _as_flops(formula: Callable[..., int]) -> Callable[..., int]:
    def flops(*shapes: Any, out_shape: object = None, **options: object) -> int:
        return 2 * formula(*shapes)

    return flops


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


def _on_meta(leaf: Any) -> Any:
    """Return a tensor like this one on the meta device; replace a device by it, and leave other values."""
    if isinstance(leaf, Tensor):
        return torch.empty_like(leaf, device="meta")
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


def _unwritten(result: Any) -> Any:
    """Return uninitialised tensors on the CPU in the place of those on the meta device."""
    if isinstance(result, (list, tuple)):
        return type(result)(map(_unwritten, result))
    if not isinstance(result, Tensor):
        return result
    return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="cpu")


def _signature(tree: Any) -> Any:
    """Return what decides the shapes of the results: types, shapes and strides of tensors, and all other values."""
    if isinstance(tree, Tensor):
        return tree.dtype, tree.shape, tree.stride()
    if isinstance(tree, dict):
        return tuple((name, _signature(value)) for name, value in tree.items())
    if isinstance(tree, (list, tuple)):
        return tuple(map(_signature, tree))
    return type(tree), tree  # 1, 1.0 and True are equal


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if not isinstance(tree, (dict, list, tuple)):
        return []
    branches = tree.values() if isinstance(tree, dict) else tree
    return [tensor for branch in branches for tensor in _tensors(branch)]


def _has_floating(tree: Any) -> bool:
    return any(tensor.is_floating_point() for tensor in _tensors(tree))


def _bytes(tensor: Tensor) -> int:
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in sizes if stride != 0)
