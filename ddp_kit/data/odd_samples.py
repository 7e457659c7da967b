"""Which sample is to blame, where samples fit into no batch."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from ddp_kit.errors import DataError, some

Collate = Callable[[list[Any]], Any]
# What a sample is made of: (where in it, what is there), for each of its parts.
Parts = dict[str, str]


def collated(
    samples: list[Any],
    collate: Collate,
    *,
    indices: NDArray[np.int64],
    below: NDArray[np.int64] | None = None,
    what: str,
) -> Any:
    """Returns the batch that `collate` makes of samples.

    Args: `indices` (B,) name the samples in errors, and `below` those in the data set that a Subset
        is of; `what` data they are of, in words.
    Raises: DataError that names the sample which is None or unlike the others, from torch's own
        collate; what another one raises, told the samples.
    """
    try:
        return collate(samples)
    except Exception as error:
        fault = _odd_one(samples, is_default=collate is default_collate)
        words = ""
        if fault is not None:
            place, found = fault
            words = f"{sample_named(place, indices=indices, below=below)} {found}"
        if collate is not default_collate:
            listed = some([str(index) for index in indices])
            note = f"while putting samples {listed} of the {what} into a batch"
            error.add_note(f"{note}; {words}" if words else note)
            raise
        raise DataError(
            f"the {what}: {words or error}. Mend the sample or leave it out, or put them into a "
            "batch by Data(dataset, collate=...)."
        ) from error


def sample_named(
    place: int, *, indices: NDArray[np.int64], below: NDArray[np.int64] | None = None
) -> str:
    """Returns what the sample at a place of a batch is called in errors."""
    name = f"sample {indices[place]}"
    if below is not None:
        name += f" (index {below[place]} of the data set in the Subset)"
    return name


def require_as_many(answer: Any, size: int, *, what: str) -> None:
    """Raises: DataError if a data set gave None, or a list of another number of samples."""
    given = ""
    if answer is None:
        given = "None"
    elif isinstance(answer, list) and len(answer) != size:
        given = f"{len(answer)} samples"
    if given:
        raise DataError(f"the {what}: its __getitems__ gave {given} for {size} indices.")


def _odd_one(samples: Sequence[Any], *, is_default: bool) -> tuple[int, str] | None:
    """Returns the place of the odd sample and what is odd about it; None if none is.

    A collate of the user's own may be made for samples of all shapes: only None is odd then.
    """
    for place, sample in enumerate(samples):
        if sample is None:
            return place, "is None"
    if not is_default:
        return None
    every = [_parts_of(sample) for sample in samples]
    for place, parts in enumerate(every):
        for where, found in parts.items():
            if found == "None":
                return place, f"has None{where}"
    usual = _most_common(every)
    for place, parts in enumerate(every):
        words = _difference(parts, usual)
        if words:
            return place, words
    for where, found in usual.items():
        if found.startswith("a ") and found not in ("a number", "a text"):
            return 0, f"has {found}{where}, which no batch of tensors can hold"
    return None


def _most_common(every: Sequence[Parts]) -> Parts:
    counts = Counter(str(parts) for parts in every)
    usual = counts.most_common(1)[0][0]
    return next(parts for parts in every if str(parts) == usual)


def _difference(parts: Parts, usual: Parts) -> str:
    for where in [*parts, *usual]:
        found = parts.get(where)
        others = usual.get(where)
        if found != others and found is not None and others is not None:
            return f"has {found}{where}, others have {others}"
    return ""


def _parts_of(sample: Any, where: str = "") -> Parts:
    """Returns what a sample is made of, the whole before its parts."""
    at = f" at {where}" if where else ""
    if isinstance(sample, (torch.Tensor, np.ndarray)):
        return {at: f"shape {tuple(sample.shape)}"}
    if isinstance(sample, Mapping):
        found = {at: f"the keys {', '.join(map(str, sample))}"}
        for key, value in sample.items():
            found |= _parts_of(value, f"{where}[{key!r}]")
        return found
    if isinstance(sample, (tuple, list)):
        found = {at: f"{len(sample)} value{'' if len(sample) == 1 else 's'}"}
        for place, value in enumerate(sample):
            found |= _parts_of(value, f"{where}[{place}]")
        return found
    if sample is None:
        return {at: "None"}
    if isinstance(sample, (str, bytes)):
        return {at: "a text"}
    if isinstance(sample, (int, float, np.number, np.bool_)):
        return {at: "a number"}
    return {at: f"a {type(sample).__name__}"}
