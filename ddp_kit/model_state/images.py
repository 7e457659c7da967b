"""Images of attributes: what a value was, whether it is still that, and putting it back.

Plain data are numbers, texts, None, and lists, tuples, sets, deques and dicts of them. A container
is put back in place, so that whoever else holds it sees it too. Tensors outside of a model's
registers and arrays have their values noted, generators their states, objects that hold nothing but
these their attributes; of any other object only which it is.
"""

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from ddp_kit.distributed.tensors_from_rank import as_bytes

# Of a container and all in it. A larger one is told by which object it is, and how long.
MOST_PARTS = 1000
DEEPEST = 8
CONTAINERS = (list, tuple, set, frozenset, deque, dict)
# Whose objects are none of a user's own.
ENGINES = {"torch", "deepspeed", "ddp_kit"}
SCALARS = (type(None), bool, int, float, str)
Encoded = Any


@dataclass
class Image:
    """What a value was."""

    origin: Any
    # Of a container; None: it is none, or too large.
    parts: "list[Image] | None" = None
    keys: list[Any] = field(default_factory=list)
    # A tensor's or an array's values or a generator's state.
    content: Any = None
    # Whether the parts are an object's attributes.
    is_record: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is numbers, texts and containers of them alone."""
        if self.is_record:
            return False
        if self.parts is not None:
            keys_are_plain = all(isinstance(key, SCALARS) for key in self.keys)
            return keys_are_plain and all(part.is_plain for part in self.parts)
        return isinstance(self.origin, SCALARS)

    @property
    def is_large(self) -> bool:
        """Whether it is a container of too many parts."""
        if self.parts is not None:
            return any(part.is_large for part in self.parts)
        return isinstance(self.origin, CONTAINERS)

    @property
    def is_generator(self) -> bool:
        """Whether it is a generator of random numbers, or a container with one."""
        if self.parts is not None:
            return any(part.is_generator for part in self.parts)
        return _state_reader(self.origin) is not None

    def shows(self, value: Any) -> bool:
        """Whether a value is what it was."""
        if self.parts is None:
            return self._shows_leaf(value)
        if self.is_record:
            if value is not self.origin:
                return False
            value = vars(value)
        elif type(value) is not type(self.origin) or len(value) != len(self.parts):
            return False
        if isinstance(self.origin, (set, frozenset)):
            return bool(value == {part.origin for part in self.parts})
        if isinstance(value, Mapping):
            if list(value) != self.keys:
                return False
            value = list(value.values())
        return all(part.shows(item) for part, item in zip(self.parts, value, strict=True))

    def _shows_leaf(self, value: Any) -> bool:
        origin = self.origin
        if value is not origin:
            if not isinstance(origin, SCALARS) or type(value) is not type(origin):
                return False
            # A nan is itself.
            return bool(value == origin) or repr(value) == repr(origin)
        if isinstance(origin, torch.Tensor) and self.content is not None:
            return same_bits(origin.detach(), self.content)
        if isinstance(origin, np.ndarray) and self.content is not None:
            kept: np.ndarray[Any, Any] = self.content
            is_alike = origin.shape == kept.shape and origin.dtype == kept.dtype
            return is_alike and origin.tobytes() == kept.tobytes()
        read = _state_reader(origin)
        return read is None or bool(_same_state(read(), self.content))

    def put_back(self) -> Any:
        """Returns the value as it was."""
        if self.parts is None:
            self._put_leaf_back()
            return self.origin
        items = [part.put_back() for part in self.parts]
        if self.shows(self.origin):
            return self.origin
        if self.is_record:
            vars(self.origin).clear()
            vars(self.origin).update(zip(self.keys, items, strict=True))
        elif isinstance(self.origin, Mapping):
            self.origin.clear()  # type: ignore[attr-defined]
            self.origin.update(zip(self.keys, items, strict=True))  # type: ignore[attr-defined]
        elif isinstance(self.origin, (list, deque)):
            self.origin.clear()
            self.origin.extend(items)
        elif isinstance(self.origin, set):
            self.origin.clear()
            self.origin.update(items)
        return self.origin

    def _put_leaf_back(self) -> None:
        origin = self.origin
        if isinstance(origin, torch.Tensor) and self.content is not None:
            if not same_bits(origin.detach(), self.content):
                origin.detach().copy_(self.content)
            return
        if isinstance(origin, np.ndarray) and self.content is not None:
            np.copyto(origin, self.content)
            return
        read = _state_reader(origin)
        if read is not None and not _same_state(read(), self.content):
            _set_state(origin, self.content)


def image_of(value: Any) -> Image:
    """Returns the image of a value as it is now."""
    return _image(value, _Budget(MOST_PARTS), depth=0)


@dataclass
class _Budget:
    parts: int


def _image(value: Any, budget: _Budget, *, depth: int) -> Image:
    if isinstance(value, torch.Tensor):
        # A model's own are noted where they are registered.
        is_own = isinstance(value, nn.Parameter) or value.is_meta or hasattr(value, "to_local")
        return Image(value, content=None if is_own else value.detach().clone())
    read = _state_reader(value)
    if read is not None:
        return Image(value, content=read())
    if _is_array(value):
        return Image(value, content=value.copy())
    if _is_record(value):
        return _image_of_record(value, budget, depth=depth)
    is_container = isinstance(value, CONTAINERS) and not hasattr(value, "_fields")
    if not is_container or depth >= DEEPEST or len(value) > budget.parts:
        return Image(value)
    budget.parts -= len(value)
    keys = list(value) if isinstance(value, dict) else []
    items = value.values() if isinstance(value, dict) else value
    parts = [_image(item, budget, depth=depth + 1) for item in items]
    return Image(value, parts=parts, keys=keys)


def _is_record(value: Any, *, depth: int = 0) -> bool:
    """Whether a value is an object of a user's own with attributes, all of them data: a meter.

    One that holds something else, a module, a lock or a file, lives a life of its own, and torch's
    objects may hold memory that is not there now. Nothing is copied before that is known.
    """
    kinds = (type, ModuleType, FunctionType, MethodType, nn.Module, *CONTAINERS, *SCALARS)
    if isinstance(value, kinds) or type(value).__module__.partition(".")[0] in ENGINES:
        return False
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict) or not 0 < len(attributes) <= MOST_PARTS:
        return False
    return all(_is_data(item, depth=depth + 1) for item in attributes.values())


def _is_data(value: Any, *, depth: int) -> bool:
    """Whether a value is numbers, texts, tensors, arrays and generators, and containers and objects
    of them."""
    if type(value) is torch.Tensor:
        return value.layout is torch.strided and not value.is_meta
    if isinstance(value, SCALARS) or _is_array(value) or _state_reader(value) is not None:
        return True
    if depth >= DEEPEST:
        return False
    if isinstance(value, CONTAINERS):
        items = value.values() if isinstance(value, dict) else value
        return len(value) <= MOST_PARTS and all(_is_data(item, depth=depth + 1) for item in items)
    return _is_record(value, depth=depth)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biufc" and value.flags.writeable


def _image_of_record(value: Any, budget: _Budget, *, depth: int) -> Image:
    """Returns the image of an object: of its attributes."""
    attributes = vars(value)
    if depth >= DEEPEST or len(attributes) > budget.parts:
        return Image(value)
    budget.parts -= len(attributes)
    parts = [_image(item, budget, depth=depth + 1) for item in attributes.values()]
    return Image(value, parts=parts, keys=list(attributes), is_record=True)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits, wherever they lie."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.device != other.device:
        one = one.to(other.device)
    return torch.equal(as_bytes(one), as_bytes(other))


def _state_reader(value: Any) -> Callable[[], Any] | None:
    """Returns what reads a generator's state, None for what is no generator."""
    if isinstance(value, torch.Generator):
        return value.get_state
    if isinstance(value, random.Random):
        return value.getstate
    if isinstance(value, np.random.Generator):
        return lambda: value.bit_generator.state
    if isinstance(value, np.random.RandomState):
        return lambda: value.get_state(legacy=False)
    return None


def _same_state(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple):
        return bool(one == other)
    # NumPy's have arrays in them, of fewer numbers than a text leaves out.
    return repr(one) == repr(other)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def encoded(value: Any) -> Encoded:
    """Returns plain data as JSON can hold them; numbers that are not finite, and containers, are
    marked."""
    if isinstance(value, float) and value - value != 0:
        return {"float": repr(value)}
    if isinstance(value, SCALARS):
        return value
    if isinstance(value, Mapping):
        return {"dict": [[encoded(key), encoded(item)] for key, item in value.items()]}
    items = list(value)
    if isinstance(value, (set, frozenset)):
        items.sort(key=repr)
    content = [encoded(item) for item in items]
    if isinstance(value, deque):
        return {"deque": content, "maxlen": value.maxlen}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: content}
    raise AssertionError(f"{type(value).__name__} is no plain data")


def decoded(value: Encoded) -> Any:
    """Returns what `encoded` was given."""
    if not isinstance(value, dict):
        return value
    if "float" in value:
        return float(value["float"])
    if "dict" in value:
        return {decoded(key): decoded(item) for key, item in value["dict"]}
    if "deque" in value:
        return deque(map(decoded, value["deque"]), maxlen=value["maxlen"])
    for kind in (list, tuple, set, frozenset):
        if kind.__name__ in value:
            items: Sequence[Any] = value[kind.__name__]
            return kind(map(decoded, items))
    raise ValueError(f"{sorted(value)} marks no plain data")
