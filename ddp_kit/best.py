"""The weights of the best evaluation, kept in memory until the end of a run.

Owns: which evaluation was best, and a copy of what was evaluated (the average of the weights where that is on).
Refuses: files. It costs one copy of the weights, and only in runs that need one.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ddp_kit.settings import EarlyStop
from ddp_kit.weights import named_weights


def best_metric(rule: EarlyStop, names: Iterable[str]) -> str:
    """Returns the evaluation metric that decides: the early-stopping one, else the (first) loss; "" if there is neither."""
    return rule.metric or next((name for name in names if name == "loss" or name.endswith("/loss")), "")


def best_notes(rule: EarlyStop, names: Collection[str], *, has_test: bool) -> list[str]:
    """Says at start where "best" may be another one than was meant."""
    notes = []
    if rule.mode == "min" and re.search(r"acc|auc|auroc|f1|top[-_]?\d", rule.metric):
        notes.append(f"a smaller {rule.metric} counts as the better one: if it is the larger one, type --early-stop.mode max")
    if has_test and names and not best_metric(rule, names):
        notes.append(
            "the last weights are the ones tested, not the best, since evaluation reports no loss: let it report one, or type "
            f"--early-stop.metric with one of {', '.join(names)}"
        )
    return notes


class BestWeights:
    """Keeps a copy of the weights at the best value of one metric. Every rank keeps its own; they are equal."""

    def __init__(self, model: nn.Module, *, metric: str, mode: str):
        self._model, self._metric, self._mode = model, metric, mode
        self._copy: dict[str, torch.Tensor] = {}
        self.step = 0
        self.value = math.nan

    @classmethod
    def of(cls, model: nn.Module, rule: EarlyStop, names: Iterable[str]) -> "BestWeights":
        """Returns one that follows the early-stopping metric, else the (first) evaluation loss."""
        return cls(model, metric=best_metric(rule, names), mode=rule.mode if rule.metric else "min")

    def offer(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Copies the weights if an evaluation's metrics are the best so far."""
        value = metrics.get(self._metric, math.nan)
        is_better = value < self.value if self._mode == "min" else value > self.value
        if is_better or (math.isnan(self.value) and not math.isnan(value)):
            self.value, self.step = value, step
            self._copy = {name: tensor.clone() for name, tensor in named_weights(self._model).items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Puts the best weights into the model, and the last ones back at the end. Without any it changes nothing."""
        live = named_weights(self._model)
        last = {name: live[name].clone() for name in self._copy}
        _copy_all(self._copy, live)
        try:
            yield
        finally:
            _copy_all(last, live)


@torch.no_grad()
def _copy_all(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
