"""Where a batch has to be: its device, floating-point dtype and memory format."""

import copy
import inspect
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence


class Placement:
    """Puts a batch where the model wants it. Where nothing is to be done it costs nothing.

    float32 becomes `dtype` and complex64 its complex counterpart; other values stay as they are.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ):
        self.device = device
        self.dtype = dtype
        self.channels_last = channels_last
        self.is_needed = device.type != "cpu" or dtype != torch.float32 or channels_last

    def __call__(self, batch: Any) -> Any:
        """Returns the batch with its tensors placed.

        Copies to CUDA do not block where the source is pinned.
        """
        if not self.is_needed:
            return batch
        return map_tensors(batch, self._place, other=self._place_other)

    def _place_other(self, value: Any) -> Any:
        """What moves itself has dtypes of its own."""
        if self.device.type == "cpu":
            return value
        return _moved(value, self.device)

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype = tensor.dtype
        if dtype == torch.float32:
            dtype = self.dtype
        elif dtype == torch.complex64:
            dtype = self.dtype.to_complex()
        if self.channels_last and tensor.dim() == 4 and _is_of_images(tensor):
            return tensor.to(
                self.device, dtype, non_blocking=True, memory_format=torch.channels_last
            )
        return tensor.to(self.device, dtype, non_blocking=True)


def _is_of_images(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.dtype == torch.uint8


def map_tensors(
    batch: Any,
    change: Callable[[torch.Tensor], torch.Tensor],
    *,
    other: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """Returns a batch with its tensors changed, of tuples, lists, mappings, dataclasses and packed
    sequences; `other` says what becomes of other values.
    """

    def mapped(value: Any) -> Any:
        return map_tensors(value, change, other=other)

    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, PackedSequence):
        # Its batch sizes are numbers that torch wants in host memory.
        return PackedSequence(
            change(batch.data),
            batch.batch_sizes,
            mapped(batch.sorted_indices),
            mapped(batch.unsorted_indices),
        )
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(value) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(mapped(value) for value in batch)
    if isinstance(batch, MutableMapping):
        # A copy keeps what kind of mapping it is.
        changed = copy.copy(batch)
        for name, value in batch.items():
            changed[name] = mapped(value)
        return changed
    if is_record(batch):
        changed = copy.copy(batch)
        for field in fields(batch):
            if hasattr(batch, field.name):
                # A frozen one too; its constructor may want something else.
                object.__setattr__(changed, field.name, mapped(getattr(batch, field.name)))
        return changed
    return other(batch)


def is_record(value: Any) -> bool:
    """Whether a value is an instance of a dataclass."""
    return is_dataclass(value) and not isinstance(value, type)


def parts_of(batch: Any) -> list[Any]:
    """Returns what a value of a batch is made of, nothing for one that is no container."""
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, (tuple, list)):
        return list(batch)
    if is_record(batch):
        return [getattr(batch, field.name, None) for field in fields(batch)]
    if hasattr(batch, "to"):
        return list(getattr(batch, "__dict__", {}).values())
    return []


def _moved(value: Any, device: torch.device) -> Any:
    """Returns a value on a device by its own `to`, if it has one."""
    to = getattr(value, "to", None)
    if to is None or isinstance(value, type):
        return value
    if _takes_non_blocking(type(value)):
        moved = to(device, non_blocking=True)
    else:
        moved = to(device)
    # One that moves itself, and forgets to return what it is then.
    return value if moved is None else moved


def _takes_non_blocking(kind: Any) -> bool:
    try:
        parameters = inspect.signature(kind.to).parameters.values()
    except (AttributeError, TypeError, ValueError):
        # A `to` that each object has of its own, or of no signature.
        return False
    return any(parameter.name == "non_blocking" for parameter in parameters)


def stays_in_stream(batch: Any) -> bool:
    """Whether a batch is copied, if at all, in the stream that uses it: where a tensor of it is on
    a CUDA device already, or something in it moves itself, and its memory would not be known.
    """
    found: list[bool] = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor.is_cuda)
        return tensor

    def look_at_other(value: Any) -> Any:
        found.append(hasattr(value, "to"))
        return value

    map_tensors(batch, look, other=look_at_other)
    return any(found)
