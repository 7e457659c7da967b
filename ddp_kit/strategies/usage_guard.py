"""What of the model a rank's training uses, held against what it used before the first step.

Ranks that gather weights and sum gradients together must use the same modules in the same order.
In the dry run all of them ran the same samples; a rank that departs from that later is named here
before it takes other weights for its own. All ranks leaving out the same modules in one step is
refused too: no rank could know that of the others without asking at every call.
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
class Usage:
    """What a loss call used in its first micro-batch, that of the dry run.

    `modules` in the order of their calls. The first `num_in_forward` of them came before backward,
    which may call some again (activation checkpointing). `parameters` in the order in which they
    got a gradient.
    """

    modules: list[str]
    num_in_forward: int
    parameters: list[str]


@final
class UsageGuard:
    """One per model; it holds every micro-batch of a loss call against the first one."""

    def __init__(
        self, root: nn.Module, gathered: Sequence[nn.Module], *, is_summed_in_order: bool = False
    ):
        """Registers hooks on the modules.

        Args:
            root: the module around the model through which every use goes.
            gathered: the modules inside it at whose calls ranks gather weights, with the hooks
                that do so.
            is_summed_in_order: whether gradients are summed with the others' in the order in which
                they come, whatever parameter they are of.
        """
        self._is_summed_in_order = is_summed_in_order
        self._dry_runs: dict[int, Usage] = {}  # by loss call
        self._hooked_parameters: set[int] = set()

        # Of the micro-batch that is under way.
        self._is_on = False
        self._expected: Usage | None = None
        self._called: list[str] = []
        self._num_in_forward = 0
        self._with_gradient: list[str] = []

        names = {id(module): name for name, module in root.named_modules()}
        self._named = [(names[id(module)], module) for module in [root, *gathered]]
        for name, module in self._named[1:]:
            # First of all hooks: before weights are gathered.
            module.register_forward_pre_hook(self._call_hook(_short(name)), prepend=True)

    @contextmanager
    def micro_batch(self, call: nn.Module) -> Iterator[None]:
        """Around forward and backward of one micro-batch.

        Raises: DdpKitError before a call that the dry run did not have there.
        """
        self._expected = self._dry_runs.get(id(call))
        self._called = []
        self._with_gradient = []
        self._is_on = True
        hooks = []
        if self._expected is None:
            for name, module in self._named:
                hooks.append(module.register_forward_pre_hook(self._gradient_hook(name)))
        try:
            yield
        finally:
            self._is_on = False
            for hook in hooks:
                hook.remove()
        if self._expected is None:
            usage = Usage(self._called, self._num_in_forward, self._with_gradient)
            self._dry_runs[id(call)] = usage

    def end_forward(self) -> None:
        """Called between forward and backward.

        Raises: DdpKitError if calls of the dry run are missing.
        """
        if not self._is_on:
            return
        self._num_in_forward = len(self._called)
        if self._expected is None:
            return
        if self._num_in_forward < self._expected.num_in_forward:
            missing = self._expected.modules[self._num_in_forward]
            raise DdpKitError(
                f"{missing} was not called, as it was before the first step. {GATHERED}"
            )

    def watched(self, total: torch.Tensor) -> torch.Tensor:
        """Returns what backward is to begin at.

        That is a tensor of its own, so that its hook comes before those that sum gradients.
        """
        if not self._is_on or self._expected is None:
            return total
        outer = total.view_as(total)
        outer.register_hook(lambda _: Variable._execution_engine.queue_callback(self._end_backward))
        return outer

    def _end_backward(self) -> None:
        """Called when all gradients are there, before the sums that wait for that."""
        assert self._expected is not None
        expected = self._expected.parameters
        missing = sorted(set(expected).difference(self._with_gradient))
        if missing:
            raise DdpKitError(no_gradient(missing, is_split=True))
        if not self._is_summed_in_order:
            return
        for here, there in zip_longest(self._with_gradient, expected, fillvalue="nothing"):
            if here != there:
                raise DdpKitError(
                    f"{here} got its gradient where {there} did before the first step. {SUMMED}"
                )

    def _gradient_hook(self, prefix: str) -> Callable[..., None]:
        """Returns a hook for when a module has its weights.

        Gradients reach these whole weights, not the parts that ranks hold of them.
        """

        def register(module: nn.Module, inputs: Any) -> None:
            for name, parameter in module.named_parameters(prefix=prefix):
                # A part belongs to a module inside, which gathers for itself.
                is_part = hasattr(parameter, "to_local")
                if not parameter.requires_grad or is_part:
                    continue
                if id(parameter) not in self._hooked_parameters:
                    self._hooked_parameters.add(id(parameter))
                    parameter.register_post_accumulate_grad_hook(self._note_gradient(_short(name)))

        return register

    def _note_gradient(self, name: str) -> Callable[[torch.Tensor], None]:
        return lambda _: self._with_gradient.append(name)

    def _call_hook(self, name: str) -> Callable[..., None]:
        """Returns a hook that notes a module's call."""

        def note(module: nn.Module, inputs: Any) -> None:
            if not self._is_on:
                return
            if self._expected is not None:
                self._require_expected(name, self._expected.modules)
            self._called.append(name)

        # A graph would be compiled anew with every change of the list.
        hidden: Callable[..., None] = torch.compiler.disable(note)
        return hidden

    def _require_expected(self, name: str, expected: list[str]) -> None:
        position = len(self._called)
        there = expected[position] if position < len(expected) else "nothing"
        if name != there:
            raise DdpKitError(
                f"{name} was called where {there} was before the first step. {GATHERED}"
            )


def _short(name: str) -> str:
    """Returns a name as it is in the recipe's model, which the root holds as `model`."""
    return name.removeprefix("model.")
