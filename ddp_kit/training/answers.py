"""What a recipe's own code answers for the records, looked at before it is added up.

An answer of another kind than those that count is named, with what it is: left out in silence, or
added up as it happens to be, it would be a wrong number. So is a metric with the name of a field
that records have of their own.
"""

import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ddp_kit.errors import DdpKitError
from ddp_kit.metrics import Number
from ddp_kit.trackers.console import BOOKKEEPING

# What every record may have beside its metrics.
TAKEN = frozenset(BOOKKEEPING)
# And a train record beside the loss's metrics.
TAKEN_IN_TRAINING = TAKEN | {
    "loss",
    "loss_mean",
    "lr",
    "grad_norm",
    "loss_scale",
    "skipped",
    "mfu",
}
KINDS = "biufc"  # of NumPy's dtypes, those that torch has


def require_free(names: Iterable[object], taken: frozenset[str], *, what: str) -> None:
    """Raises: DdpKitError if a metric is not named by a text, or as a field of the record is."""
    for name in names:
        if not isinstance(name, str):
            raise DdpKitError(f"{what}: a metric is named {name!r}; a name is a text.")
        if name in taken:
            raise DdpKitError(
                f"{what}: a metric cannot be named {name!r}, which a record has of its own. "
                f"These names are taken: {', '.join(sorted(taken))}."
            )


def require_pairs(metrics: Any) -> None:
    """Raises: DdpKitError for metrics of a loss that are not {name: (sum, count)}, or have a name
    that is taken."""
    what = "the loss's metrics"
    if not isinstance(metrics, Mapping):
        raise DdpKitError(f"{what} are {described(metrics)}; expected {{name: (sum, count)}}.")
    require_free(metrics, TAKEN_IN_TRAINING, what=what)
    for name, value in metrics.items():
        if _pair_of(value) is None:
            raise DdpKitError(
                f"{what}: {name!r} is {described(value)}; expected a pair (sum, count) of numbers."
            )


class Answer:
    """What `evaluate` returned for one micro-batch: `sums` and `rows` by name."""

    def __init__(self, measured: Any, *, size: int):
        """Takes a micro-batch of `size` samples.

        Raises: DdpKitError for anything but pairs (sum, count), and rows, one for each sample.
        """
        self.sums: dict[str, tuple[Number, Number]] = {}
        self.rows: dict[str, torch.Tensor] = {}
        if not isinstance(measured, Mapping):
            raise DdpKitError(
                "evaluate must return {name: (sum, count)}, or rows in place of a pair; it "
                f"returned {described(measured)}."
            )
        require_free(measured, TAKEN, what="evaluate")
        for name, value in measured.items():
            pair = _pair_of(value)
            if pair is not None:
                self.sums[name] = pair
                continue
            rows = _rows_of(value)
            if rows is None:
                raise DdpKitError(
                    f"evaluate: {name!r} is {described(value)}; expected a pair (sum, count) of "
                    f"numbers, or rows: a tensor with one for each of the {size} samples."
                )
            if rows.dim() == 0 or len(rows) != size:
                raise DdpKitError(
                    f"evaluate: rows of {name!r} have shape {tuple(rows.shape)} for "
                    f"{size} samples; expected one row each."
                )
            self.rows[name] = rows

    @property
    def kinds(self) -> dict[str, str]:
        """Which kind of answer stands under each name."""
        return dict.fromkeys(self.sums, "a pair") | dict.fromkeys(self.rows, "rows")


def numbers_in(summary: Any) -> dict[str, float]:
    """Returns what `summarize` returned, as floats.

    Raises: DdpKitError for anything but {name: number}, or a name that is taken.
    """
    if not isinstance(summary, Mapping):
        raise DdpKitError(
            f"summarize must return {{name: float}}; it returned {described(summary)}."
        )
    require_free(summary, TAKEN, what="summarize")
    found = {}
    for name, value in summary.items():
        number = _number_of(value)
        if number is None:
            raise DdpKitError(f"summarize: {name!r} is {described(value)}; expected a number.")
        found[name] = float(number)
    return found


def _pair_of(value: Any) -> tuple[Number, Number] | None:
    """Returns a tuple or list of two numbers as (sum, count), None if it is something else."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        return None
    total = _number_of(value[0])
    count = _number_of(value[1])
    if total is None or count is None:
        return None
    return total, count


def _number_of(value: Any) -> Number | None:
    """Returns a real number, that of a tensor or array of one element too; None if it is none.

    A tensor stays on its device: nothing is read back.
    """
    if isinstance(value, torch.Tensor):
        is_one = value.numel() == 1 and not value.is_complex()
        return value.detach().reshape(()) if is_one else None
    if isinstance(value, np.ndarray | np.generic):
        is_one = value.size == 1 and value.dtype.kind in KINDS.removesuffix("c")
        if not is_one:
            return None
        value = value.item()
    if isinstance(value, numbers.Integral):
        # A count, which no mean can be.
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else None


def _rows_of(value: Any) -> torch.Tensor | None:
    """Returns a tensor, that of a NumPy array too; None if it is neither, or has no plain
    memory."""
    if isinstance(value, np.ndarray) and value.dtype.kind in KINDS:
        try:
            return torch.from_numpy(np.ascontiguousarray(value))
        except TypeError:
            # More digits than torch has, or another order of bytes.
            return None
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    return None if value.is_nested else value.detach()


def described(value: Any) -> str:
    """Returns what a value is, in words."""
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} of shape {value.shape}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    kind = type(value).__name__
    if isinstance(value, tuple | list):
        inner = [described(item) for item in value[:3]]
        more = ", ..." if len(value) > len(inner) else ""
        return f"a {kind} of {len(value)} ({', '.join(inner)}{more})"
    return f"of type {kind}"
