"""The flags of a Settings class, as data: names, type, default and help, under a heading each."""

import dataclasses
import inspect
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ddp_kit.config.field_texts import field_texts
from ddp_kit.config.kinds import in_words
from ddp_kit.config.rules import rules
from ddp_kit.settings import Settings, flag


@dataclass(frozen=True)
class Flag:
    """One field as a flag. `task` is "" for a recipe's own field."""

    name: str  # --early-stop.patience
    negative: str  # what switches a bool off, "" for other types
    kind: str
    default: str
    text: str
    task: str = ""
    group: str = ""  # what the nested group of fields is that it is in


def flags_of(cls: type[Settings], default: Settings) -> list[Flag]:
    """Returns the flags in the order of the fields, those of nested groups one by one.

    Args: `default` the settings that hold without any flag.
    """
    ours = rules(Settings)
    found: list[Flag] = []
    for field in dataclasses.fields(cls):
        task = ours[field.name].task if field.name in ours else ""
        made = _of_field(cls, field.name, getattr(default, field.name))
        found += [dataclasses.replace(each, task=task) for each in made]
    return found


def _of_field(cls: type, name: str, value: Any, *, prefix: str = "") -> Iterator[Flag]:
    hint = typing.get_type_hints(cls)[name]
    dashed = prefix + name.replace("_", "-")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        group = inspect.cleandoc(hint.__doc__ or "")
        for field in dataclasses.fields(hint):
            inner = getattr(value, field.name)
            for each in _of_field(hint, field.name, inner, prefix=f"{dashed}."):
                yield dataclasses.replace(each, group=each.group or group)
        return
    is_switch = hint is bool
    yield Flag(
        name=flag(dashed),
        negative=flag(f"{prefix}no-{name}") if is_switch else "",
        kind="" if is_switch else in_words(hint),
        default=_shown(value),
        text=field_texts(cls).get(name, ""),
    )


def _shown(value: Any) -> str:
    """Returns a default as one would type it; an empty text in quotes, or nothing would be seen."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(_shown, value))
    if isinstance(value, Enum):
        return value.name
    return str(value) or "''"


def names_of(cls: type[Settings]) -> set[str]:
    """Returns everything that is a flag of a recipe."""
    names = {"--help", "--settings"}
    for each in flags_of(cls, cls()):
        names.add(each.name)
        if each.negative:
            names.add(each.negative)
    return names
