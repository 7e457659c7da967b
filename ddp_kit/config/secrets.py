"""Which of a run's settings are secrets, and their texts."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from ddp_kit.io.logs import REDACTED as REDACTED
from ddp_kit.io.redact import redact
from ddp_kit.settings import Settings, to_json


def secrets_of(settings: Settings) -> set[str]:
    """Returns the texts that `redact` takes out of the settings.

    A word that is a field's default, as "label" of a label_key, is none.
    """
    values = to_json(settings)
    words = set()
    for each in fields(settings):
        default = str(each.default)
        if re.fullmatch("[a-z_]+", default):
            words.add(default)
    return set(_taken_out(values, redact(values))) - words


def _taken_out(value: Any, redacted: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _taken_out(inner, redacted[name])
    elif isinstance(value, list | tuple):
        for inner, other in zip(value, redacted, strict=True):
            yield from _taken_out(inner, other)
    elif value != redacted:
        kept = map(re.escape, redacted.split(REDACTED))
        match = re.fullmatch("(.+)".join(kept), str(value), re.DOTALL)
        assert match is not None  # that is how `redacted` was made
        for text in match.groups():
            yield text
            yield text.partition(":")[2]  # of a login inside a URL


def is_secret_setting(name: str, text: str) -> bool:
    """Whether `redact` takes something out of a setting.

    Args: as `settings.flatten` has it, `name` is `group.field` and `text` its JSON text.
    """
    value: Any = json.loads(text)
    for part in reversed(name.split(".")):
        value = {part: value}
    return bool(redact(value) != value)
