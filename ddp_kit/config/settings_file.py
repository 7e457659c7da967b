"""`--settings FILE`: settings out of a TOML or JSON file, also a run's own settings.json."""

import dataclasses
import json
import tomllib
import typing
from pathlib import Path
from typing import Any

from ddp_kit.config.kinds import converted, fits
from ddp_kit.errors import ConfigError, nearest
from ddp_kit.io.logs import REDACTED
from ddp_kit.settings import flag


def read_settings_file(path: Path) -> dict[str, Any]:
    """Returns the fields in a TOML or JSON file, also those in a run's own settings.json.

    Raises: ConfigError if it is missing or cannot be read.
    """
    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ConfigError(f"--settings {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"--settings {path}: neither TOML nor JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--settings {path}: expected a table of fields.")
    inner = values.get("settings")
    if isinstance(inner, dict):
        return inner
    return values


def with_values(settings: Any, values: dict[str, Any], *, where: str, prefix: str = "") -> Any:
    """Returns a dataclass with some fields replaced by a file's values.

    Args: `where` the file, for errors; `prefix` the names of the groups around, `early_stop.`.
    Raises: ConfigError if a name is not known or a value is not of its field's type.
    """
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    changes: dict[str, Any] = {}
    for name, value in values.items():
        key = name.replace("-", "_")
        place = f"--settings {where}: {prefix}{name}"
        if key not in fields:
            near = nearest(key, fields)
            hint = f" Did you mean {prefix}{near}?" if near else ""
            raise ConfigError(f"--settings {where}: unknown field {prefix}{name}.{hint}")
        old = fields[key]
        if not dataclasses.is_dataclass(old):
            changes[key] = _as_field(type(settings), key, value, where=place)
        elif isinstance(value, dict):
            changes[key] = with_values(old, value, where=where, prefix=f"{prefix}{name}.")
        else:
            raise ConfigError(f"{place} = {value!r}: expected a table.")
    return dataclasses.replace(settings, **changes)


def _as_field(cls: type, name: str, value: Any, *, where: str) -> Any:
    """Returns a TOML or JSON value as the field's type has it.

    Raises: ConfigError if it does not fit, or was redacted.
    """
    hint = typing.get_type_hints(cls)[name]
    if value == REDACTED:
        raise ConfigError(
            f"{where} was redacted when it was written."
            f" Remove it there and type {flag(name)} with the value."
        )
    if fits(value, hint):
        return converted(value, hint)
    expected = hint.__name__ if isinstance(hint, type) else hint
    raise ConfigError(f"{where} = {value!r}: expected {expected}.")
