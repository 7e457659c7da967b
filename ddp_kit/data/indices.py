"""Indices that somebody else's code gave, of an order or a Subset.

They are checked and not cast: a mask or floats would be taken for other samples without a word.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Subset

from ddp_kit.errors import DataError


def as_indices(given: Any, *, what: str, least: int = 0, below: int | None) -> NDArray[np.int64]:
    """Returns indices (n,) as they were given by NumPy, torch, or as a list of whole numbers.

    Args: `what` gave them, for the error; they are from `least` to `below` - 1 (None: any).
    Raises: DataError for anything else, and for none at all.
    """
    found = _as_array(given)
    fault = _fault_of(given, found)
    if fault is None and found is not None:
        fault = _out_of_range(found, least=least, below=below)
    if fault is not None:
        raise DataError(
            f"{what} gave {fault}. Expected are whole numbers, the indices of samples, in one "
            "dimension: of NumPy, of torch, or a list."
        )
    assert found is not None
    return found.astype(np.int64, copy=False)


def _as_array(given: Any) -> NDArray[Any] | None:
    """Returns None for what is no array, list or range of numbers."""
    if isinstance(given, torch.Tensor):
        return given.detach().cpu().numpy()
    if not isinstance(given, (np.ndarray, list, tuple, range)):
        return None
    try:
        return np.asarray(given)
    except ValueError:
        return np.asarray(given, dtype=object)


def _fault_of(given: Any, found: NDArray[Any] | None) -> str | None:
    if given is None:
        return "None"
    if found is None:
        return f"a {type(given).__name__}"
    if not found.size:
        return "no indices at all"
    if found.dtype.kind == "b":
        return "a boolean mask (np.flatnonzero(mask) gives its indices)"
    if found.dtype.kind in "fc":
        return f"{found.dtype} numbers (.astype(int) cuts them to indices, if that is meant)"
    if found.dtype.kind == "O" and any(isinstance(row, (list, tuple)) for row in found):
        return "lists of different lengths"
    if found.dtype.kind not in "iu":
        return f"what is no numbers ({found.dtype})"
    if found.ndim != 1:
        return f"indices of shape {found.shape}"
    return None


def _out_of_range(found: NDArray[Any], *, least: int, below: int | None) -> str | None:
    if below is None:
        return None
    for value in (int(found.min()), int(found.max())):
        if not least <= value < below:
            return f"the index {value} where there are {least} to {below - 1}"
    return None


def subset_indices(part: Subset[Any]) -> NDArray[np.int64]:
    """Returns the indices of a Subset into its data set, those from its end counted from its start.

    Raises: DataError for what is no list of indices.
    """
    size = None
    if hasattr(part.dataset, "__len__"):
        size = len(part.dataset)
    if not len(part.indices):
        return np.empty(0, dtype=np.int64)
    found = as_indices(part.indices, what="a Subset", least=-(size or 0), below=size)
    if size is None or found.min() >= 0:
        return found
    return np.where(found < 0, found + size, found)


def require_subsets(dataset: Any) -> None:
    """Raises: DataError if a Subset around a data set has no list of indices."""
    while type(dataset) is Subset:
        subset_indices(dataset)
        dataset = dataset.dataset
