"""What of the model a rank's training uses: ranks that gather weights and sum gradients together must use the same, in the same order.

Owns: finding the rank that departs from its rehearsal, which all ran on the same samples, before it takes other weights for its own.
Refuses: letting all ranks leave the same modules out in a step: no rank could know that of the others without asking at every call.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, final

import torch
from torch import nn
from torch.autograd import Variable

from ddp_kit.errors import DdpKitError, no_gradient

SAME = "all must call the same modules in the same order. Or type --strategy zero1."
GATHERED = f"Ranks gather weights at each call, and would mix them up: {SAME}"
SUMMED = f"Ranks sum gradients as they come, and would mix them up: {SAME}"


@dataclass
class Rehearsed:
    """What a loss call used in its first micro-batch: modules in the order of their calls, of which the first `forward` came before
    backward, which may call some again (activation checkpointing), and parameters in the order in which they got a gradient."""

    modules: list[str]
    forward: int
    parameters: list[str]


@final
class Uses:
    """One per model; it holds every micro-batch of a loss call against the first one."""

    def __init__(
        self, root: nn.Module, gathered: Sequence[nn.Module], *, is_summed_in_order: bool = False
    ):
        """Args: `gathered` the modules inside `root` at whose calls ranks gather weights, with the hooks that do so; `is_summed_in_order`
        whether gradients are summed with the others' in the order in which they come, whatever parameter they are of.
        """
        self._rehearsed: dict[int, Rehearsed] = {}  # by loss call
        self._expected: Rehearsed | None = None
        self._is_on, self._modules, self._forward, self._reached = (
            False,
            list[str](),
            0,
            list[str](),
        )
        self._is_summed_in_order = is_summed_in_order
        self._watched = set[int]()
        names = {id(module): name for name, module in root.named_modules()}
        self._places = [(names[id(module)], module) for module in [root, *gathered]]
        for name, module in self._places[1:]:
            module.register_forward_pre_hook(
                self._noting(_short(name)), prepend=True
            )  # before weights are gathered

    @contextmanager
    def micro_batch(self, call: nn.Module) -> Iterator[None]:
        """Around forward and backward of one micro-batch.

        Raises: DdpKitError before a call that the rehearsal did not have there.
        """
        self._expected, self._modules, self._reached, self._is_on = (
            self._rehearsed.get(id(call)),
            [],
            [],
            True,
        )
        hooks = (
            []
            if self._expected
            else [
                module.register_forward_pre_hook(self._watching(name))
                for name, module in self._places
            ]
        )
        try:
            yield
        finally:
            self._is_on = False
            for hook in hooks:
                hook.remove()
        self._rehearsed.setdefault(id(call), Rehearsed(self._modules, self._forward, self._reached))

    def end_forward(self) -> None:
        """Called between forward and backward. Raises: DdpKitError if calls of the rehearsal are missing."""
        if not self._is_on:
            return
        self._forward = len(self._modules)
        if self._expected is not None and self._forward < self._expected.forward:
            raise DdpKitError(
                f"{self._expected.modules[self._forward]} was not called, as it was before the first step. {GATHERED}"
            )

    def watched(self, total: torch.Tensor) -> torch.Tensor:
        """Returns what backward is to begin at: a tensor of its own, so that its hook comes before those that sum gradients."""
        if not self._is_on or self._expected is None:
            return total
        outer = total.view_as(total)
        outer.register_hook(lambda _: Variable._execution_engine.queue_callback(self._end_backward))
        return outer

    def _end_backward(self) -> None:
        """Called when all gradients are there, before the sums that wait for that."""
        assert self._expected is not None
        expected = self._expected.parameters
        if missing := sorted(set(expected).difference(self._reached)):
            raise DdpKitError(no_gradient(missing, is_split=True))
        if self._is_summed_in_order and self._reached != expected:
            here, there = next(
                (a, b)
                for a, b in zip_longest(self._reached, expected, fillvalue="nothing")
                if a != b
            )
            raise DdpKitError(
                f"{here} got its gradient where {there} did before the first step. {SUMMED}"
            )

    def _watching(self, place: str) -> Callable[..., None]:
        """Returns a hook for when a module has its weights: gradients reach these, not the parts that ranks hold of them."""

        def watch(module: nn.Module, inputs: Any) -> None:
            for name, parameter in module.named_parameters(prefix=place):
                is_part = hasattr(
                    parameter, "to_local"
                )  # of a module inside that gathers for itself
                if parameter.requires_grad and not is_part and id(parameter) not in self._watched:
                    self._watched.add(id(parameter))
                    parameter.register_post_accumulate_grad_hook(self._reaching(_short(name)))

        return watch

    def _reaching(self, name: str) -> Callable[[torch.Tensor], None]:
        return lambda _: self._reached.append(name)

    def _noting(self, name: str) -> Callable[..., None]:
        """Returns a hook that notes a module's call."""

        def note(module: nn.Module, inputs: Any) -> None:
            if not self._is_on:
                return
            if self._expected is not None:
                at, expected = len(self._modules), self._expected.modules
                there = expected[at] if at < len(expected) else "nothing"
                if name != there:
                    raise DdpKitError(
                        f"{name} was called where {there} was before the first step. {GATHERED}"
                    )
            self._modules.append(name)

        hidden: Callable[..., None] = torch.compiler.disable(
            note
        )  # a graph would be compiled anew with every change of the list
        return hidden


def _short(name: str) -> str:
    return name.removeprefix("model.")  # as in the recipe's model, which the root holds
