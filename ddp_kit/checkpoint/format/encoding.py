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
# What can be read back: Python reads numbers of 4,300 digits and JSON of some 1,000 levels.
MOST_BITS = 14_000
DEEPEST = 100


def encode(value: Any, tensors: dict[str, torch.Tensor], *, name: str, depth: int = 0) -> Any:
    """Returns plain JSON data. Tensors go into `tensors` under `name` and their path, with a number
    behind it where that is taken; inf, nan, tuples and int keys are marked.

    Raises: ConfigError for anything else, naming it.
    """
    if depth > DEEPEST:
        raise ConfigError(f"{name[:80]}... is deeper than {DEEPEST} levels of lists and dicts.")

    def inside(item: Any, key: object) -> Any:
        return encode(item, tensors, name=f"{name}.{key}", depth=depth + 1)

    if isinstance(value, torch.Tensor):
        name = _free(name, tensors)
        tensors[name] = value.detach()
        return {TENSOR: name}
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int) and value.bit_length() <= MOST_BITS:
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return {FLOAT: repr(value)}
    # A named tuple would come back as a plain one, without the names.
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {TUPLE: [inside(item, i) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [inside(item, i) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        items = [(key, inside(item, key)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        if all(isinstance(key, str | int) for key, _ in items):
            return {PAIRS: [list(item) for item in items]}
    # A scalar of NumPy.
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return encode(value.item(), tensors, name=name, depth=depth + 1)
    kind = f"a {type(value).__name__}"
    if isinstance(value, int):
        kind = f"an int of more than {MOST_BITS} bits"
    elif isinstance(value, tuple):
        kind = f"a named tuple ({type(value).__name__})"
    raise ConfigError(
        f"{name} is {kind}, which a checkpoint cannot hold: expected tensors, "
        "numbers, texts, and lists or dicts of "
        "them. Keep it out of the state dict, or as one of these."
    )


def _free(name: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns a name that no tensor has: paths are joined by dots, which keys may hold too."""
    free = name
    number = 1
    while free in tensors:
        number += 1
        free = f"{name}~{number}"
    return free


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
