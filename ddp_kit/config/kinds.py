"""What a field's type allows: of values as TOML and JSON have them, and in words for people."""

import types
import typing
from enum import Enum
from pathlib import PurePath
from typing import Any, Literal

NON_FINITE = ("inf", "-inf", "nan")  # texts, since JSON has no such numbers


def fits(value: Any, hint: Any) -> bool:
    """Whether a value, as TOML or JSON has it, fits a field's type."""
    origin = typing.get_origin(hint)
    inner = typing.get_args(hint)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, (list, tuple)) and _items_fit(value, inner)
    if origin in (list, dict):
        return isinstance(value, origin)
    if inner:  # a union
        return any(fits(value, kind) for kind in inner)
    if isinstance(hint, type):
        return _is_of(hint, value)
    return True


def _items_fit(values: list[Any] | tuple[Any, ...], inner: tuple[Any, ...]) -> bool:
    kinds = _kinds_of_items(inner, len(values))
    return len(kinds) == len(values) and all(map(fits, values, kinds))


def _kinds_of_items(inner: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """Returns the type of each item of a tuple: tuple[int, ...] has any number of one type."""
    if inner[1:] == (...,):
        return inner[:1] * count
    return inner


def _is_of(kind: type, value: Any) -> bool:
    # A bool is an int to Python, and none to who writes a settings file.
    if kind is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number or value in NON_FINITE
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if issubclass(kind, Enum):
        return isinstance(value, kind) or value in kind.__members__
    if issubclass(kind, PurePath):
        return isinstance(value, (str, PurePath))
    return isinstance(value, kind)


def converted(value: Any, hint: Any) -> Any:
    """Returns a TOML or JSON value that fits as the field's type has it."""
    origin = typing.get_origin(hint)
    inner = typing.get_args(hint)
    if origin is tuple:
        kinds = _kinds_of_items(inner, len(value))
        return tuple(converted(item, kind) for item, kind in zip(value, kinds, strict=True))
    if inner and origin not in (list, dict, Literal):
        return converted(value, next(kind for kind in inner if fits(value, kind)))
    if not isinstance(hint, type):
        return value
    if hint is float or issubclass(hint, PurePath):
        return hint(value)
    if issubclass(hint, Enum) and isinstance(value, str):
        return hint[value]
    return value


def in_words(hint: Any) -> str:
    """Returns how `--help` writes a type: INT, {fp32,bf16}, [STR [STR ...]]."""
    origin = typing.get_origin(hint)
    inner = typing.get_args(hint)
    if origin is Literal:
        return _choice(inner)
    if origin in (tuple, list, set):
        if origin is tuple and inner[1:] != (...,):
            return " ".join(map(in_words, inner))
        item = in_words(inner[0])
        return f"[{item} [{item} ...]]"
    if origin in (typing.Union, types.UnionType):
        return "|".join(map(in_words, inner))
    if hint is type(None):
        return "{None}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _choice(hint.__members__)
    return getattr(hint, "__name__", str(hint)).upper()


def _choice(names: typing.Iterable[Any]) -> str:
    return "{" + ",".join(map(str, names)) + "}"
