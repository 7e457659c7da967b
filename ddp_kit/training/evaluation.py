"""One pass over an evaluation set: every sample exactly once, at any world size.

Owns: adding up sums and counts over micro-batches and ranks, collecting rows in sample order, and dividing once.
Refuses: padding that counts, means of means, and DDP's wrapper (the bare module is called).
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ddp_kit.data.reader import MicroBatch
from ddp_kit.data.seeding import forward_key, generators_put_back, seed_forward
from ddp_kit.distributed.collectives import first_difference, gather_rows, sum_by_name
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DdpKitError
from ddp_kit.metrics import Totals, means
from ddp_kit.recipe import Pairs, Recipe
from ddp_kit.settings import Precision
from ddp_kit.strategies.precision import autocast
from ddp_kit.training.nonfinite import samples_named

EVALUATION = (
    -1
)  # stands for the step in the keys of evaluation's draws: each evaluation has the same ones
Measure = Callable[[nn.Module, Any], Pairs]
Rows = dict[str, torch.Tensor]


def measure_of(recipe: Recipe) -> Measure:
    """Returns the recipe's `evaluate`, else the sums of its losses (with several objectives named `part/loss`)."""
    if recipe.evaluate is not None:
        return recipe.evaluate
    parts = recipe.parts()

    def measure(model: nn.Module, batch: Any) -> Pairs:
        sums: dict[str, Any] = {}
        for part in parts:
            prefix = f"{part.trains}/" if len(parts) > 1 else ""
            sums |= {prefix + name: pair for name, pair in part.loss(model, batch).sums().items()}
        return sums

    return measure


def bare(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function that uses a whole model."""
    return function(*arguments)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode without gradients; at the end each module has its own mode again (a frozen layer stays so)."""
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
    """Returns the metrics of a pass, the same on all ranks. Every rank calls it, with the same number of micro-batches.

    `measure(model, batch)` gives {name: (sum, count)} or {name: rows (B, ...)}; `summarize(means, rows)` gets the divided sums and
    the rows of all samples in sample order, and its metrics are added to the means. `heed` is called after each micro-batch, and may raise.
    `enter(function, *arguments)` calls a function that uses the model as the strategy has it.
    """
    with evaluating(model), autocast(precision, group.device):
        totals, names, rows, indices = _pass(
            model, micro_batches, group=group, measure=partial(enter, measure), seed=seed, heed=heed
        )
    blocks = [int(own[0]) for own in indices]
    metrics = means(sum_by_name(group, totals.tensor(names), names=names, order=blocks))
    if rows or summarize is not None:
        collected = _in_sample_order(group, rows, indices)
        if summarize is not None:
            metrics |= {
                name: float(value) for name, value in summarize(dict(metrics), collected).items()
            }
    return metrics


def _pass(
    model: nn.Module,
    micro_batches: Iterable[MicroBatch],
    *,
    group: Group,
    measure: Measure,
    seed: int,
    heed: Callable[[], None] | None,
) -> tuple[Totals, list[str], dict[str, list[torch.Tensor]], list[np.ndarray[Any, Any]]]:
    totals, names = Totals(group.device), set[str]()
    rows: dict[str, list[torch.Tensor]] = {}
    indices = []
    for micro_batch in micro_batches:
        request = micro_batch.request
        seed_forward(forward_key(seed), EVALUATION, request.micro_batch, device=group.device)
        with samples_named(micro_batch, "of an evaluation"):
            pairs = measure(model, micro_batch.batch)
        sums = {name: value for name, value in pairs.items() if isinstance(value, tuple)}
        names |= sums.keys()
        for name, value in pairs.items():
            if isinstance(value, torch.Tensor):
                if value.dim() == 0 or len(value) != micro_batch.size:
                    raise DdpKitError(
                        f"evaluate: rows of {name!r} have shape {tuple(value.shape)} for {micro_batch.size} samples; expected one row each."
                    )
                own = value.detach().cpu()  # host-device synchronisation
                rows.setdefault(name, []).append(own[:0] if request.is_padding else own)
        if not request.is_padding:
            totals.add(sums)
            indices.append(request.indices)
        if heed is not None:
            heed()
    return totals, sorted(names), rows, indices


def _in_sample_order(
    group: Group, rows: dict[str, list[torch.Tensor]], indices: list[np.ndarray[Any, Any]]
) -> Rows:
    """Returns the rows of all ranks, sorted by sample index."""
    if first_difference(group, [zlib.crc32("\n".join(sorted(rows)).encode())]) is not None:
        raise DdpKitError(
            f"the ranks' `evaluate` returned rows under different names; rank {group.rank} has {', '.join(sorted(rows))}."
        )
    own = (
        torch.from_numpy(np.concatenate(indices)) if indices else torch.empty(0, dtype=torch.int64)
    )
    order = torch.argsort(torch.cat(gather_rows(group, own)))
    return {
        name: torch.cat(gather_rows(group, torch.cat(rows[name])))[order] for name in sorted(rows)
    }
