"""Whether what is given as a sum is one: a sum over samples doubles where each of them comes twice.

A mean in its place would be divided by the count once more, and train with gradients so many times
too small. It is only told of: that a total does not grow may be meant.
"""

import copy
import math
import sys
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ddp_kit.metrics import Number, Sums, float_of

MOST_SAMPLES = 8  # that are tried, and then twice as many
# Of a count that doubles with the samples.
DOUBLED = 1.7
# By which share of itself a loss may change and still be a mean; what couples samples changes.
SAME_LOSS = 0.3
# The same of a metric, which may be a small whole number.
SAME_METRIC = 0.01

Run = Callable[[Any, int], Sums]
Pairs = dict[str, tuple[float, float]]


class _UncutError(Exception):
    """A batch that is not one sample after another."""


def means_among(run: Run, batch: Any, *, size: int) -> list[str]:
    """Returns the names of sums that stay as they are where each sample comes twice, though their
    counts double.

    None are found where that cannot be told: in a batch that cannot be cut, of code that takes no
    other number of samples, among draws that change more than doubling does.

    Args: `run(batch, draws)` gives the pairs of a batch, with draws of that number, and may change
        the model, which the caller puts back; `size` samples of `batch`.
    """
    some = torch.arange(min(size // 2, MOST_SAMPLES))
    if not len(some):
        return []
    try:
        once = _taken(batch, some, size=size)
        twice = _taken(batch, torch.cat([some, some]), size=size)
        with _uncompiled():
            first = run(once, 0)
            before = _numbers(first)
            after = _numbers(run(twice, 0))
            # Whether there is a suspect or not: a loss that talks to other ranks would wait for
            # those that see none.
            again = _numbers(run(once, 1))
    except Exception:
        # Whatever a user's code raises with another number of samples than it was written for.
        return []
    suspects = [name for name in before if _is_same(name, before, after)]
    suspects = [name for name in suspects if not _is_counted(first[name][0])]
    if _couples_samples(before, after):
        suspects = [name for name in suspects if _is_loss(name)]
    if again == before:
        return suspects
    # What is drawn anew may have hidden the growth of a metric; a loss is of all samples.
    return [name for name in suspects if _is_loss(name) and _is_near(before, again, name)]


def note_of_loss(what: str) -> str:
    """Returns what to say of a loss that looks like a mean."""
    return (
        f"{what} has a total that does not grow with the samples, as a mean does not: it is "
        "divided by the count once more. If it is a mean, return LossMean(mean, count)"
    )


def note_of_metrics(names: list[str], *, what: str) -> str:
    """Returns what to say of metrics that look like means."""
    return (
        f"{what} has pairs whose sum does not grow with the samples, as a mean does not: "
        f"{', '.join(names)}. A pair is (sum, count), of a mean (mean * count, count)"
    )


def _uncompiled() -> AbstractContextManager[object]:
    """Lets what is compiled run as it is written: it would be compiled again for other sizes."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def _is_same(name: str, before: Pairs, after: Pairs) -> bool:
    """Whether a sum stays while its count doubles."""
    if name not in after:
        return False
    total, count = before[name]
    later_total, later_count = after[name]
    if not math.isfinite(total) or not total or later_count < DOUBLED * count or not count:
        return False
    most = SAME_LOSS if _is_loss(name) else SAME_METRIC
    return abs(later_total - total) <= most * abs(total)


def _is_counted(total: Number) -> bool:
    """Whether a sum is a whole number by its type, as no mean is."""
    if isinstance(total, torch.Tensor):
        return not total.is_floating_point()
    return isinstance(total, int)


def _couples_samples(before: Pairs, after: Pairs) -> bool:
    """Whether a loss shows that samples are compared with each other, as contrastive ones do.

    Its metrics cannot be told then: a sample that comes twice is its own rival.
    """
    for name in before:
        total = before[name][0]
        if not _is_loss(name) or name not in after or not total:
            continue
        growth = after[name][0] / total
        if min(abs(growth - 1), abs(growth - 2)) > SAME_METRIC:
            return True
    return False


def _is_loss(name: str) -> bool:
    return name.rpartition("/")[2] == "loss"


def _is_near(before: Pairs, again: Pairs, name: str) -> bool:
    """Whether other draws change a sum by less than doubling would."""
    total = before[name][0]
    return abs(again[name][0] - total) <= 0.1 * abs(total)


def _numbers(sums: Sums) -> Pairs:
    return {name: (float_of(total), float_of(count)) for name, (total, count) in sums.items()}


def size_of(batch: Any) -> int:
    """Returns how many samples a batch has by its first tensor, 0 if there is none."""
    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.dim() else 0
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, tuple | list):
        sizes = [size_of(value) for value in batch]
        return next((size for size in sizes if size), 0)
    return 0


def _taken(batch: Any, indices: torch.Tensor, *, size: int) -> Any:
    """Returns some samples of a batch.

    Raises: _UncutError if it is not made of tensors and lists of `size` samples each.
    """
    if isinstance(batch, torch.Tensor):
        is_plain = batch.layout is torch.strided and not batch.is_nested
        if not is_plain or not batch.dim() or len(batch) != size:
            raise _UncutError
        return batch.index_select(0, indices.to(batch.device))
    if isinstance(batch, tuple | list):
        if len(batch) == size and all(isinstance(value, str | int | float) for value in batch):
            return type(batch)([batch[i] for i in indices.tolist()])
        values = [_taken(value, indices, size=size) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    if isinstance(batch, MutableMapping):
        changed = copy.copy(batch)
        for name, value in batch.items():
            changed[name] = _taken(value, indices, size=size)
        return changed
    if batch is None or isinstance(batch, str | int | float):
        return batch
    raise _UncutError
