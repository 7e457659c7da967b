"""The weights of the best evaluation, kept in memory until the end of a run.

Owns: which evaluation was best, and a copy of what was evaluated (the average of the weights where that is on).
Refuses: files. It costs one copy of the weights, and only in runs that need one.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ddp_kit.settings import EarlyStop
from ddp_kit.weights import named_weights


class BestWeights:
    """Keeps a copy of the weights at the best value of one metric. Every rank keeps its own; they are equal."""

    def __init__(self, model: nn.Module, *, metric: str, mode: str):
        self._model, self._metric, self._mode = model, metric, mode
        self._copy: dict[str, torch.Tensor] = {}
        self.step = 0
        self.value = math.nan

    @classmethod
    def of(cls, model: nn.Module, rule: EarlyStop, names: Mapping[str, float]) -> "BestWeights":
        """Returns one that follows the early-stopping metric, else the (first) evaluation loss."""
        losses = [name for name in names if name == "loss" or name.endswith("/loss")]
        return cls(model, metric=rule.metric, mode=rule.mode) if rule.metric else cls(model, metric=losses[0] if losses else "", mode="min")

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
