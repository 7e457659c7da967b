"""State as JSON and named tensors: the only two forms in which a checkpoint holds anything.

An object of any other class would have to be pickled, and loading a pickle may run code: it is an
error when the first step is done, not when the run is to go on.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ddp_kit.errors import ConfigError

# The one key of an object that stands for something else.
TENSOR = "$tensor"
FLOAT = "$float"
TUPLE = "$tuple"
PAIRS = "$pairs"


def encode(value: Any, tensors: dict[str, torch.Tensor], *, name: str) -> Any:
    """Returns plain JSON data. Tensors go into `tensors` under `name` and their path; inf, nan,
    tuples and int keys are marked.

    Raises: ConfigError for anything else, naming it.
    """
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach()
        return {TENSOR: name}
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return {FLOAT: repr(value)}
    if isinstance(value, tuple):
        return {TUPLE: [encode(item, tensors, name=f"{name}.{i}") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [encode(item, tensors, name=f"{name}.{i}") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        items = [(key, encode(item, tensors, name=f"{name}.{key}")) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        if all(isinstance(key, str | int) for key, _ in items):
            return {PAIRS: [list(item) for item in items]}
    # A scalar of NumPy.
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return encode(value.item(), tensors, name=name)
    raise ConfigError(
        f"{name} is a {type(value).__name__}, which a checkpoint cannot hold: expected tensors, "
        "numbers, texts, and lists or dicts of "
        "them. Keep it out of the state dict, or as one of these."
    )


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Returns what `encode` was given, with the tensors of that name."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (kind, content), *_ = value.items()
        if kind == TENSOR:
            return tensors[content]
        if kind == FLOAT:
            return float(content)
        if kind == TUPLE:
            return tuple(decode(item, tensors) for item in content)
        if kind == PAIRS:
            return {key: decode(item, tensors) for key, item in content}
    return {key: decode(item, tensors) for key, item in value.items()}


def references(value: Any) -> Iterator[str]:
    """Yields the names of the tensors that an encoded value refers to."""
    if isinstance(value, dict):
        if set(value) == {TENSOR}:
            yield value[TENSOR]
            return
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from references(item)
