"""The buffers that training changes: the same on all ranks at every step boundary.

These are the running statistics of normalisation layers, as views of one flat tensor, and any other
buffer that a forward pass changes. DDP would take all of them from rank 0, which throws away what
the other ranks have seen.

Each micro-batch of a step starts from the step's base statistics; what the micro-batches of all
ranks made of them is averaged once per step by one asynchronous reduction that runs beside
backward. `num_batches_tracked` grows by one per step, however often the step's losses call a layer,
and not at all where a layer is frozen in evaluation mode. Only where statistics are plain means
(`momentum=None`) and it is their count, it grows by the calls.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.tree_sum import Fold, fold


@dataclass(frozen=True)
class Buffer:
    """Where a buffer lives.

    A model that assigns to it (`self.seen = ...`) replaces the tensor that averages and files hold.
    """

    name: str
    module: nn.Module
    attribute: str
    tensor: torch.Tensor

    def in_place(self) -> torch.Tensor:
        """Brings an assigned value into the first tensor, puts that back in place, returns it."""
        current = self.module._buffers[self.attribute]
        if current is not None and current is not self.tensor:
            self.tensor.copy_(current.detach())
            self.module._buffers[self.attribute] = self.tensor
        return self.tensor


def buffers_of(model: nn.Module) -> list[Buffer]:
    """Returns every buffer of a model."""
    found = []
    for prefix, module in model.named_modules():
        for name, tensor in module._buffers.items():
            if tensor is not None:
                found.append(Buffer(f"{prefix}.{name}".lstrip("."), module, name, tensor))
    return found


@contextmanager
def buffers_put_back(model: nn.Module) -> Iterator[list[tuple[Buffer, torch.Tensor]]]:
    """Gives every buffer with its value, and puts the values back at the end."""
    before = [(buffer, buffer.tensor.detach().clone()) for buffer in buffers_of(model)]
    try:
        yield before
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.in_place().copy_(value)


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
        self._group = group
        self._total = micro_batches
        layers = [module for module in model.modules() if _has_statistics(module)]
        self._flat = _as_views(layers, ("running_mean", "running_var"))
        self._counters = _as_views(layers, ("num_batches_tracked",))
        self._first_counters = self._counters.clone()
        self._most_growth = _most_growth(layers).to(self._counters.device)
        self._averages = bool(layers) and (micro_batches > 1 or always)
        self.others: list[Buffer] = []  # buffers outside normalisation layers that training changes
        self._work: dist.Work | None = None
        self._base = self._flat.clone()
        self._base_counters = self._counters.clone()
        self._base_others: list[torch.Tensor] = []
        # One tensor, so that one reduction takes both.
        sizes = [self._flat.numel(), self._counters.numel()]
        self._deltas = self._flat.new_zeros(sum(sizes))
        self._changes, self._counts = self._deltas.split(sizes)
        self._tree = Fold() if exact else None
        self._nodes: list[torch.Tensor] = []  # of the tree, one for each rank

    @property
    def owned(self) -> set[int]:
        """Addresses of the storages that hold running statistics."""
        return {tensor.untyped_storage().data_ptr() for tensor in (self._flat, self._counters)}

    def begin_step(self) -> None:
        """Notes how many steps the layers have seen."""
        if self._counters.numel():
            self._first_counters.copy_(self._counters)

    def begin(self) -> None:
        """Takes the base of an objective's part of a step."""
        if self._flat.numel():
            self._base.copy_(self._flat)
            self._base_counters.copy_(self._counters)
            self._deltas.zero_()
        self._base_others = [buffer.tensor.clone() for buffer in self.others]

    def rewind(self) -> None:
        """Puts the base back, before a forward pass."""
        if self._averages:
            self._flat.copy_(self._base)
            self._counters.copy_(self._base_counters)

    def capture(self) -> None:
        """Adds what a forward pass changed, before its backward."""
        if not self._averages:
            return
        self._changes.add_(self._flat).sub_(self._base)
        self._counts.add_(self._counters).sub_(self._base_counters)
        if self._tree is not None:
            self._tree.push([self._deltas.clone()])
            self._deltas.zero_()

    def launch(self) -> None:
        """Starts the sum over ranks, after the last forward pass of the step."""
        if not self._averages:
            return
        group = self._group.sums_pg
        if self._tree is None:
            if group is not None:
                self._work = dist.all_reduce(self._deltas, group=group, async_op=True)
            return
        own = self._tree.total()[0]
        if group is None:
            self._nodes = [own]
            return
        self._nodes = [torch.empty_like(own) for _ in range(self._group.world_size)]
        self._work = dist.all_gather(self._nodes, own, group=group, async_op=True)

    def finish(self) -> None:
        """Writes the averages, after the last backward."""
        if self._averages or self.others:
            self._write()
        if self._counters.numel():
            most = self._first_counters + self._most_growth
            torch.minimum(self._counters, most, out=self._counters)

    @torch.no_grad()
    def _write(self) -> None:
        if self._averages:
            if self._work is not None:
                self._work.wait()
                self._work = None
            if self._nodes:
                self._deltas.copy_(fold(self._nodes))
            torch.add(self._base, self._changes, alpha=1 / self._total, out=self._flat)
            calls = (self._counts / self._total).ceil().long()
            torch.add(self._base_counters, calls, out=self._counters)
        for buffer in self.others:
            tensor = buffer.in_place()
            if self._group.sums_pg is not None:
                dist.broadcast(tensor, 0, group=self._group.sums_pg)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the base back for good: the step is not applied."""
        self._flat.copy_(self._base)
        self._counters.copy_(self._base_counters)
        for buffer, base in zip(self.others, self._base_others, strict=True):
            buffer.tensor.copy_(base)


def _has_statistics(module: nn.Module) -> bool:
    if not isinstance(module, _NormBase):
        return False
    return module.track_running_stats and module.running_mean is not None


def _most_growth(layers: Sequence[nn.Module]) -> torch.Tensor:
    """Returns by how much each layer's counter may grow in a step."""
    counting = [layer for layer in layers if layer._buffers["num_batches_tracked"] is not None]
    is_plain_mean = torch.tensor([layer.momentum is None for layer in counting], dtype=torch.int64)
    return 1 + is_plain_mean * 2**31


def _as_views(layers: Sequence[nn.Module], names: Sequence[str]) -> torch.Tensor:
    """Replaces buffers by views of one flat tensor, which it returns."""
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
        layer._buffers[name] = flat[begin:end].view(buffer.shape)
        begin = end
    return flat
