"""Rules by which tyro makes options of settings, of tuples of numbers, and of modes that are optional."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from typing import Any

import docstring_parser
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from ..training.finetuning.settings import FinetuneSettings
from ..training.settings import PretrainSettings

registry = ConstructorRegistry()


@registry.struct_rule
def _settings(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Make options of the documented fields of settings, which are checked only when the command asks for them.

    A value that is not allowed is then reported in one line, as any other error of a command.
    """
    settings: Any = info.type
    if settings not in (PretrainSettings, FinetuneSettings):
        return None

    def later(**values: Any) -> Callable[[], Any]:
        return functools.partial(settings, **values)

    later.__doc__ = settings.__doc__
    kinds, meanings = typing.get_type_hints(settings), field_meanings(settings)
    return StructConstructorSpec(
        instantiate=later,
        fields=tuple(
            StructFieldSpec(field.name, kinds[field.name], field.default, meanings[field.name])
            for field in dataclasses.fields(settings)
        ),
    )


def field_meanings(documented: type) -> dict[str, str]:
    """Return the meaning of each field of a dataclass, from the arguments in its docstring."""
    arguments = docstring_parser.parse(documented.__doc__ or "").params
    return {argument.arg_name: " ".join((argument.description or "").split()) for argument in arguments}


@registry.primitive_rule
def _numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[tuple[float, ...]] | None:
    """Read a tuple of numbers from one text with commas."""
    kinds = [kind for kind in _alternatives(info.type) if kind is not types.NoneType]
    if len(kinds) != 1 or typing.get_origin(kinds[0]) is not tuple:
        return None
    number = typing.get_args(kinds[0])[0]
    example = "numbers of bands like 3,7" if number is int else "numbers like 550,612.5"

    def read(texts: list[str]) -> tuple[float, ...]:
        try:
            return tuple(number(part) for part in texts[0].split(","))
        except ValueError:
            raise ValueError(f"expected {example}, not {texts[0]!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="N,...",
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, tuple),
        str_from_instance=lambda value: ["None" if value is None else ",".join(map(str, value))],
    )


@registry.primitive_rule
def _mode(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool | str] | None:
    """Read true or one of several modes from an option with an optional word; `off` is false."""
    kinds = _alternatives(info.type)
    if len(kinds) != 2 or kinds[0] is not bool:
        return None
    modes = typing.get_args(kinds[1])

    def read(texts: list[str]) -> bool | str:
        if len(texts) > 1 or not {*texts} <= {*modes, "off"}:
            raise ValueError(f"expected nothing, off or one of {', '.join(modes)}, not {' '.join(texts)!r}")
        return texts != ["off"] and (texts[0] if texts else True)

    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{{{','.join((*modes, 'off'))}}}]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, (bool, str)),
        str_from_instance=lambda value: [value if isinstance(value, str) else "default" if value else "off"],
    )


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
