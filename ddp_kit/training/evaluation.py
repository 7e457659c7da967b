"""One pass over an evaluation set: every sample exactly once, at any world size.

Sums and counts are added up over micro-batches and ranks and divided once: there are no means of
means, and no padding that counts. Rows are collected in sample order. The bare model is called, not
DDP's wrapper.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ddp_kit.data.reader import MicroBatch
from ddp_kit.data.seeding import forward_key, generators_put_back, seed_forward
from ddp_kit.distributed.collectives import from_rank, sum_by_name
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.pulse import Phase
from ddp_kit.errors import DdpKitError
from ddp_kit.metrics import Sums, means, settled, tensor_of
from ddp_kit.recipe import Pairs, Recipe
from ddp_kit.settings import Precision
from ddp_kit.strategies.precision import autocast
from ddp_kit.training.answers import Answer, numbers_in
from ddp_kit.training.nonfinite import samples_named
from ddp_kit.training.rows import in_sample_order

# Stands for the step in the keys of evaluation's draws: each evaluation has the same ones.
EVALUATION = -1
SUMMARY = -1  # for the micro-batch, in those of `summarize`
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
    rewind: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Returns the metrics of a pass, the same on all ranks.

    Every rank calls it, with the same number of micro-batches.

    Args:
        measure: `measure(model, batch)` gives {name: (sum, count)} or {name: rows (B, ...)}.
        summarize: `summarize(means, rows)` gets the divided sums and the rows of all samples in
            sample order; its metrics are added to the means. Every rank calls it, with draws that
            are the same at each evaluation, and rank 0's answer is everybody's.
        heed: called after each micro-batch; may raise.
        enter: `enter(function, *arguments)` calls a function that uses the model as the strategy
            has it.
        rewind: called before each micro-batch: puts back what the one before has changed.

    Raises:
        DdpKitError: `measure` gives something that is neither, or under other names on another
            rank; `summarize` gives no numbers.
        DataError: rows of one name differ in shape or dtype, on all ranks alike.
    """
    doing = group.pulse.during(Phase.EVALUATION)
    with doing, evaluating(model), autocast(precision, group.device):
        found = _Pass(group, measure=partial(enter, measure), seed=seed)
        for micro_batch in micro_batches:
            if rewind is not None:
                rewind()
            found.take(model, micro_batch)
            group.pulse.beat()
            if heed is not None:
                heed()
    names = sorted(found.names)
    blocks = [int(indices[0]) for indices in found.indices]
    own = tensor_of(found.sums, names, device=group.device)
    sums = sum_by_name(group, own, names=names, order=blocks)
    metrics = means(sums)
    if found.rows or summarize is not None:
        rows = in_sample_order(group, found.rows, found.indices)
        if summarize is not None:
            metrics |= _summary(group, partial(summarize, dict(metrics), rows), seed=seed)
    return metrics


def _summary(group: Group, summarize: Callable[[], Any], *, seed: int) -> dict[str, float]:
    """Returns the metrics that `summarize` gives on rank 0. Every rank calls it.

    With numbers of their own, ranks would stop early, or save a best checkpoint, at other steps.
    """
    with generators_put_back():
        seed_forward(forward_key(seed), EVALUATION, SUMMARY, device=group.device)
        summary = summarize()
    answer: dict[str, Any] = {}
    try:
        answer["metrics"] = numbers_in(summary)
    except DdpKitError as error:
        answer["refused"] = str(error)
    answer = json.loads(from_rank(group, json.dumps(answer).encode()))
    if "refused" in answer:
        raise DdpKitError(answer["refused"])
    metrics: dict[str, float] = answer["metrics"]
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
        self._kinds: dict[str, str] = {}

    def take(self, model: nn.Module, micro_batch: MicroBatch) -> None:
        """Measures one micro-batch. Of padding only the names are kept."""
        request = micro_batch.request
        seed_forward(forward_key(self._seed), EVALUATION, request.micro_batch, device=self._device)
        with samples_named(micro_batch, "of an evaluation"):
            measured = self._measure(model, micro_batch.batch)
        answer = Answer(measured, size=micro_batch.size)
        self._require_kinds(answer)
        self.names |= answer.sums.keys()
        for name, rows in answer.rows.items():
            own = self.rows.setdefault(name, [])
            if not request.is_padding:
                own.append(rows.cpu())  # host-device synchronisation
        if not request.is_padding:
            self.sums.append(settled(answer.sums, device=self._device))
            self.indices.append(request.indices)

    def _require_kinds(self, answer: Answer) -> None:
        """Raises: DdpKitError if a name stands for rows in one micro-batch and for a pair in
        another."""
        for name, kind in answer.kinds.items():
            before = self._kinds.setdefault(name, kind)
            if kind != before:
                raise DdpKitError(
                    f"evaluate: {name!r} is {kind} in one micro-batch, {before} in another."
                )
