"""The running statistics of normalisation layers: the same on all ranks at every step boundary.

They are views of one flat tensor. DDP would take them from rank 0, which throws away what the other
ranks have seen.

Each micro-batch of a step starts from the step's base statistics; what the micro-batches of all
ranks made of them is averaged once per step by one asynchronous reduction that runs beside
backward. `num_batches_tracked` grows by one per step, however often the step's losses call a layer,
and not at all where a layer is frozen in evaluation mode. Only where statistics are plain means
(`momentum=None`) and it is their count, it grows by the calls.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ddp_kit.distributed.process_group import Group
from ddp_kit.model_state.step_sum import StepSum

AVERAGED = ("running_mean", "running_var")
COUNTED = ("num_batches_tracked",)
STATISTICS = AVERAGED + COUNTED


class RunningStatistics:
    """Averages running statistics over the micro-batches of a step.

    Every rank makes the calls of a step in this order: `begin_step`, then for each objective
    `begin`, per micro-batch `rewind` and `capture`, `launch` after the last forward pass, and
    `finish` after the last backward.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Group,
        *,
        micro_batches: int,
        always: bool = False,
        exact: bool = False,
    ):
        """Replaces the layers' statistics by views of one flat tensor.

        Args:
            micro_batches: of all ranks in a step.
            always: averages one micro-batch too (checkpointed activations run twice).
            exact: sums them along the fixed tree.
        """
        self._total = micro_batches
        layers = [module for module in model.modules() if has_statistics(module)]
        self._views: list[tuple[nn.Module, str, torch.Tensor]] = []
        self._flat = _as_views(layers, AVERAGED, self._views)
        self._counters = _as_views(layers, COUNTED, self._views)
        self._first_counters = self._counters.clone()
        self._most_growth = _most_growth(layers).to(self._counters.device)
        self._names = {(id(layer), name) for layer, name, _ in self._views}
        self._is_assigned_to = False
        self._has_any = bool(layers)
        self._averages = bool(layers) and (micro_batches > 1 or always)
        self._base = self._flat.clone()
        self._base_counters = self._counters.clone()
        # One tensor, so that one reduction takes both.
        sizes = [self._flat.numel(), self._counters.numel()]
        self._sum = StepSum(self._flat.new_zeros(sum(sizes)), group, exact=exact)
        self._changes, self._counts = self._sum.total.split(sizes)

    def average_always(self) -> None:
        """Averages one micro-batch too: its backward pass changes statistics again."""
        self._averages = self._has_any

    def watch_assignments(self) -> None:
        """Brings in what a forward pass assigns to statistics, in place of changing them."""
        self._is_assigned_to = True

    def owns(self, module: nn.Module, name: str) -> bool:
        """Whether a buffer is one of the running statistics."""
        return (id(module), name) in self._names

    def begin_step(self) -> None:
        """Notes how many steps the layers have seen."""
        if self._counters.numel():
            self._first_counters.copy_(self._counters)

    def begin(self) -> None:
        """Takes the base of an objective's part of a step."""
        if self._flat.numel():
            self._base.copy_(self._flat)
            self._base_counters.copy_(self._counters)
            self._sum.begin()

    def rewind(self) -> None:
        """Puts the base back, before a forward pass."""
        if self._averages:
            self._flat.copy_(self._base)
            self._counters.copy_(self._base_counters)

    def capture(self) -> None:
        """Adds what a forward pass changed, before its backward."""
        if self._is_assigned_to:
            self._bring_in()
        if not self._averages:
            return
        self._changes.add_(self._flat).sub_(self._base)
        self._counts.add_(self._counters).sub_(self._base_counters)
        self._sum.end_leaf()

    def launch(self) -> None:
        """Starts the sum over ranks, after the last forward pass of the step."""
        if self._averages:
            self._sum.launch()

    @torch.no_grad()
    def finish(self) -> None:
        """Writes the averages, after the last backward."""
        if self._averages:
            self._sum.wait()
            torch.add(self._base, self._changes, alpha=1 / self._total, out=self._flat)
            calls = (self._counts / self._total).ceil().long()
            torch.add(self._base_counters, calls, out=self._counters)
        if self._counters.numel():
            most = self._first_counters + self._most_growth
            torch.minimum(self._counters, most, out=self._counters)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the base back for good: the step is not applied."""
        self._flat.copy_(self._base)
        self._counters.copy_(self._base_counters)

    @torch.no_grad()
    def _bring_in(self) -> None:
        """Copies assigned tensors into the flat one, and puts its views back in place."""
        for module, name, view in self._views:
            current = module._buffers[name]
            if current is not view and current is not None:
                view.copy_(current)
                module._buffers[name] = view


def has_statistics(module: nn.Module) -> bool:
    """Whether a module keeps running statistics."""
    if not isinstance(module, _NormBase):
        return False
    return module.track_running_stats and module.running_mean is not None


def _most_growth(layers: Sequence[nn.Module]) -> torch.Tensor:
    """Returns by how much each layer's counter may grow in a step."""
    counting = [layer for layer in layers if layer._buffers["num_batches_tracked"] is not None]
    is_plain_mean = torch.tensor([layer.momentum is None for layer in counting], dtype=torch.int64)
    return 1 + is_plain_mean * 2**31


def _as_views(
    layers: Sequence[nn.Module],
    names: Sequence[str],
    views: list[tuple[nn.Module, str, torch.Tensor]],
) -> torch.Tensor:
    """Replaces buffers by views of one flat tensor, which it returns; `views` get each of them."""
    found = []
    for layer in layers:
        for name in names:
            buffer = layer._buffers[name]
            if buffer is not None:
                found.append((layer, name, buffer))
    if not found:
        return torch.zeros(0)
    flat = torch.cat([buffer.reshape(-1) for _, _, buffer in found])
    begin = 0
    for layer, name, buffer in found:
        end = begin + buffer.numel()
        view = flat[begin:end].view(buffer.shape)
        layer._buffers[name] = view
        views.append((layer, name, view))
        begin = end
    return flat
