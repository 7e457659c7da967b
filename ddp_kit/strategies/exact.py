"""`--exact`: gradients whose bits do not depend on the number of ranks.

Each micro-batch's gradients are a leaf of the fixed tree, kept per parameter, since DDP's buckets
may change. Nothing is averaged: the leaves must have the same bits at any world size.

A parameter that a micro-batch does not use is a leaf of -0.0, which added to any number leaves its
bits; one that no micro-batch of the step uses has no gradient, as in one process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.tree_sum import Fold, Leaf
from ddp_kit.strategies.ddp import DataParallel
from ddp_kit.strategies.optimizer_view import WholeOptimizer
from ddp_kit.strategies.ordered_allreduce import Future, OrderedAllReduce
from ddp_kit.strategies.whole import Whole, Wrapped

NOTHING = -0.0


def _blank(tensor: torch.Tensor) -> torch.Tensor:
    """Fills a tensor with what changes no bit of a sum, in both parts of complex numbers, and
    returns it."""
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    numbers.fill_(NOTHING)
    return tensor


class _Leaves:
    """The leaves of one loss call's parameters in a step."""

    def __init__(self, call: nn.Module):
        self.parameters = [parameter for parameter in call.parameters() if parameter.requires_grad]
        self.number = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        self.fold = Fold()
        self.used: set[int] = set()

    def take(self) -> None:
        """Moves the gradients of a micro-batch into the sum."""
        leaf: Leaf = []
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                leaf.append(_blank(torch.empty_like(parameter, requires_grad=False)))
            else:
                self.used.add(i)
                leaf.append(parameter.grad)
                parameter.grad = None
        self.fold.push(leaf)

    def give(self) -> None:
        """Puts the sum into the parameters' gradients."""
        for i, total in enumerate(self.fold.total()):
            self.parameters[i].grad = total if i in self.used else None
        self.used.clear()

    def blank_used(self) -> None:
        """Gives the parameters that a micro-batch before has used a gradient that adds nothing."""
        for i in self.used:
            parameter = self.parameters[i]
            parameter.grad = _blank(torch.empty_like(parameter, requires_grad=False))


@final
class ExactSingle(Whole):
    """One process: the same tree."""

    divisor = 1

    def __init__(self) -> None:
        self._leaves: dict[nn.Module, _Leaves] = {}

    def wrap(self, call: nn.Module, optimizer: Optimizer) -> Wrapped:
        """Returns `call` itself."""
        self.renew(call)
        return Wrapped(call=call, optimizer_view=WholeOptimizer(optimizer))

    def renew(self, wrapped: nn.Module) -> nn.Module:
        """Returns it, with leaves of the parameters that are trained now."""
        self._leaves[wrapped] = _Leaves(wrapped)
        return wrapped

    @contextmanager
    def micro_batch(self, wrapped: nn.Module, *, is_last: bool) -> Iterator[None]:
        """Takes the gradients as a leaf; after the last one they are the sum of all."""
        yield
        leaves = self._leaves[wrapped]
        leaves.take()
        if is_last:
            leaves.give()


@final
class ExactDataParallel(Whole):
    """DDP with a hook in place of its all-reduce.

    A rank holds a whole subtree, and the hook sums those of all ranks.
    """

    divisor = 1

    def __init__(self, group: Group, *, find_unused_parameters: bool = False):
        self._find_unused = find_unused_parameters
        self._ddp = DataParallel(group, find_unused_parameters=find_unused_parameters)
        self._all_reduce = OrderedAllReduce(group)
        self._leaves: dict[nn.Module, _Leaves] = {}

    def wrap(self, call: nn.Module, optimizer: Optimizer) -> Wrapped:
        """Returns `call` in a DDP wrapper with the hook."""
        return Wrapped(call=self._hooked(call), optimizer_view=WholeOptimizer(optimizer))

    def renew(self, wrapped: nn.Module) -> nn.Module:
        """Returns another wrapper, as DDP's own strategy does."""
        del self._leaves[wrapped]
        return self._hooked(self._ddp.let_go(wrapped))

    def _hooked(self, call: nn.Module) -> nn.Module:
        wrapped = self._ddp.ddp(call)
        leaves = _Leaves(call)
        self._leaves[wrapped] = leaves

        def hook(all_reduce: OrderedAllReduce, bucket: dist.GradBucket) -> Future:
            parameters = bucket.parameters()
            numbers = [leaves.number[id(parameter)] for parameter in parameters]
            gradients = _gradients_in(bucket)
            return all_reduce.sum(
                bucket.buffer(), before=lambda: leaves.fold.add_to(gradients, at=numbers)
            )

        wrapped.register_comm_hook(self._all_reduce, hook)
        return wrapped

    @contextmanager
    def micro_batch(self, wrapped: nn.Module, *, is_last: bool) -> Iterator[None]:
        """Takes the gradients as a leaf; those of the last one are summed with all leaves of all
        ranks beside backward."""
        leaves = self._leaves[wrapped]
        if not is_last:
            with self._ddp.micro_batch(wrapped, is_last=False):
                yield
            leaves.take()
            return
        if self._find_unused:
            # DDP has seen them used and expects a gradient; it gives one to all that any rank has
            # used.
            leaves.blank_used()
        with self._ddp.micro_batch(wrapped, is_last=True):
            yield
        self._all_reduce.check()
        leaves.fold.clear()
        leaves.used.clear()


def _gradients_in(bucket: dist.GradBucket) -> list[torch.Tensor]:
    """Returns a bucket's gradients as DDP lays them into it; unused ones are blanked."""
    parameters = bucket.parameters()
    flat = bucket.buffer()
    if parameters[0].is_complex():
        # The buffer has them as real numbers, twice as many, of which torch 2.15 makes wrong views.
        flat = torch.view_as_complex(flat.view(-1, 2))
    gradients = []
    for view, parameter in zip(bucket.gradients(), parameters, strict=True):
        gradient = flat.as_strided(parameter.shape, parameter.stride(), view.storage_offset())
        gradients.append(gradient)
        if parameter.grad is None:
            _blank(gradient)
    return gradients
