"""One pass over an evaluation set: every sample exactly once, at any world size.

Sums and counts are added up over micro-batches and ranks and divided once: there are no means of
means, and no padding that counts. Rows are collected in sample order. The bare model is called, not
DDP's wrapper.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ddp_kit.data.reader import MicroBatch
from ddp_kit.data.seeding import forward_key, generators_put_back, seed_forward
from ddp_kit.distributed.collectives import gather_rows, same_everywhere, sum_by_name
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DdpKitError
from ddp_kit.metrics import Sums, means, settled, tensor_of
from ddp_kit.recipe import Pairs, Recipe
from ddp_kit.settings import Precision
from ddp_kit.strategies.precision import autocast
from ddp_kit.training.nonfinite import samples_named

# Stands for the step in the keys of evaluation's draws: each evaluation has the same ones.
EVALUATION = -1
Measure = Callable[[nn.Module, Any], Pairs]
Rows = dict[str, torch.Tensor]
Indices = np.ndarray[Any, Any]


def measure_of(recipe: Recipe) -> Measure:
    """Returns the recipe's `evaluate`, else the sums of its losses.

    With several objectives these are named `part/loss`.
    """
    if recipe.evaluate is not None:
        return recipe.evaluate
    parts = recipe.parts()

    def measure(model: nn.Module, batch: Any) -> Pairs:
        sums: dict[str, Any] = {}
        for part in parts:
            prefix = f"{part.trains}/" if len(parts) > 1 else ""
            found = part.loss(model, batch).sums()
            sums |= {prefix + name: pair for name, pair in found.items()}
        return sums

    return measure


def bare(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function that uses a whole model."""
    return function(*arguments)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode without gradients.

    At the end each module has its own mode again (a frozen layer stays so).
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), generators_put_back():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def evaluate(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    *,
    group: Group,
    measure: Measure,
    summarize: Callable[[dict[str, float], Rows], Mapping[str, float]] | None = None,
    precision: Precision = "fp32",
    seed: int = 0,
    heed: Callable[[], None] | None = None,
    enter: Callable[..., Any] = bare,
) -> dict[str, float]:
    """Returns the metrics of a pass, the same on all ranks.

    Every rank calls it, with the same number of micro-batches.

    Args:
        measure: `measure(model, batch)` gives {name: (sum, count)} or {name: rows (B, ...)}.
        summarize: `summarize(means, rows)` gets the divided sums and the rows of all samples in
            sample order; its metrics are added to the means.
        heed: called after each micro-batch; may raise.
        enter: `enter(function, *arguments)` calls a function that uses the model as the strategy
            has it.

    Raises: DdpKitError if `measure` gives rows that are not one for each sample, or of other names
        on another rank.
    """
    with evaluating(model), autocast(precision, group.device):
        found = _Pass(group, measure=partial(enter, measure), seed=seed)
        for micro_batch in micro_batches:
            found.take(model, micro_batch)
            if heed is not None:
                heed()
    names = sorted(found.names)
    blocks = [int(indices[0]) for indices in found.indices]
    own = tensor_of(found.sums, names, device=group.device)
    sums = sum_by_name(group, own, names=names, order=blocks)
    metrics = means(sums)
    if found.rows or summarize is not None:
        rows = _in_sample_order(group, found.rows, found.indices)
        if summarize is not None:
            summary = summarize(dict(metrics), rows)
            metrics |= {name: float(value) for name, value in summary.items()}
    return metrics


class _Pass:
    """What this rank finds in one pass."""

    def __init__(self, group: Group, *, measure: Measure, seed: int):
        self._device = group.device
        self._measure = measure
        self._seed = seed
        self.sums: list[Sums] = []
        self.names: set[str] = set()  # of the sums
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.indices: list[Indices] = []

    def take(self, model: nn.Module, micro_batch: MicroBatch) -> None:
        """Measures one micro-batch. Of padding only the names are kept."""
        request = micro_batch.request
        seed_forward(forward_key(self._seed), EVALUATION, request.micro_batch, device=self._device)
        with samples_named(micro_batch, "of an evaluation"):
            measured = self._measure(model, micro_batch.batch)
        sums = {name: value for name, value in measured.items() if isinstance(value, tuple)}
        self.names |= sums.keys()
        for name, value in measured.items():
            if isinstance(value, torch.Tensor):
                self._take_rows(name, value, micro_batch)
        if not request.is_padding:
            self.sums.append(settled(sums, device=self._device))
            self.indices.append(request.indices)

    def _take_rows(self, name: str, rows: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Keeps rows (B, ...) on the host."""
        if rows.dim() == 0 or len(rows) != micro_batch.size:
            raise DdpKitError(
                f"evaluate: rows of {name!r} have shape {tuple(rows.shape)} for "
                f"{micro_batch.size} samples; expected one row each."
            )
        own = rows.detach().cpu()  # host-device synchronisation
        if micro_batch.request.is_padding:
            own = own[:0]
        self.rows.setdefault(name, []).append(own)


def _in_sample_order(
    group: Group, rows: dict[str, list[torch.Tensor]], indices: list[Indices]
) -> Rows:
    """Returns the rows of all ranks, sorted by sample index.

    Raises: DdpKitError if ranks have rows of different names.
    """
    names = sorted(rows)
    if not same_everywhere(group, names):
        raise DdpKitError(
            "the ranks' `evaluate` returned rows under different names; "
            f"rank {group.rank} has {', '.join(names)}."
        )
    own = torch.empty(0, dtype=torch.int64)
    if indices:
        own = torch.from_numpy(np.concatenate(indices))
    order = torch.argsort(torch.cat(gather_rows(group, own)))
    return {name: torch.cat(gather_rows(group, torch.cat(rows[name])))[order] for name in names}
