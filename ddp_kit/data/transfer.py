"""Where a batch has to be: its device, floating-point dtype and memory format."""

import copy
from collections.abc import Callable, MutableMapping
from typing import Any

import torch


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
        return map_tensors(batch, self._place)

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


def map_tensors(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Returns a batch of tuples, lists and dicts with its tensors changed; other values stay."""
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, change) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(value, change) for value in batch)
    if isinstance(batch, MutableMapping):
        # A copy keeps what kind of mapping it is.
        changed = copy.copy(batch)
        for name, value in batch.items():
            changed[name] = map_tensors(value, change)
        return changed
    return batch


def has_cuda_tensors(batch: Any) -> bool:
    """Whether a tensor of the batch is on a CUDA device: it cannot be pinned, and needs no copy."""
    found: list[bool] = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor.is_cuda)
        return tensor

    map_tensors(batch, look)
    return any(found)
