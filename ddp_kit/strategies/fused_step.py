"""Optimizers stepped as fast as torch can, with the numbers that they have without it.

torch's fused kernels take for granted what its other kernels do not: that all parameters of a group
get their first gradients in one step, and that parameter, gradient and state lie alike in memory.
Else they die, or step other elements than the gradient is of.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, final

import torch
from torch._C._autograd import _profiler_enabled
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

# Those of torch's optimizers that are switched to their fused kernels.
HAVE_FUSED = (SGD, Adam, AdamW)


def fuse(optimizer: Optimizer) -> bool:
    """Switches one of torch's optimizers to its fused kernel. Returns whether it did.

    One that was built with another kernel or has run is left as it is, and one whose parameters or
    momentum the kernel would take for others.
    """
    if not _can_be_fused(optimizer):
        return False
    for group in optimizer.param_groups:
        group["fused"] = True
    # As its constructor has it for fused=True.
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    return True


def _can_be_fused(optimizer: Optimizer) -> bool:
    if type(optimizer) not in HAVE_FUSED or optimizer.state:
        return False
    for group in optimizer.param_groups:
        if group.get("foreach") is not None or group.get("fused") is not None:
            return False
        if group.get("capturable") or group.get("differentiable"):
            return False
        if isinstance(group["lr"], torch.Tensor):
            return False
        # A momentum that begins late could not begin with the whole gradient.
        if group.get("dampening"):
            return False
        if not all(_is_fusable(optimizer, parameter) for parameter in group["params"]):
            return False
    return True


def _is_fusable(optimizer: Optimizer, parameter: torch.Tensor) -> bool:
    # Fused SGD has no rule for DTensors in torch 2.15.
    if type(optimizer) is SGD and hasattr(parameter, "to_local"):
        return False
    if not parameter.is_floating_point() or parameter.device.type not in ("cpu", "cuda"):
        return False
    return is_dense(parameter)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor has all of the memory over which it reaches, once."""
    own = getattr(tensor, "_local_tensor", tensor)
    # Which gives others' strides to such a tensor alone.
    return torch.empty_like(own, device="meta").stride() == own.stride()


@lru_cache(maxsize=4096)
def _lie_alike(shape: torch.Size, one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two tensors of a shape, of these strides, have their elements in the same order."""
    return all(
        size == 1 or stride == another
        for size, stride, another in zip(shape, one, other, strict=True)
    )


def _laid_as(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Returns a copy of a tensor that lies in memory as a parameter does."""
    return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


@final
class FusedInputs:
    """Makes what a fused kernel steps what the kernel takes it for."""

    def __init__(self, optimizer: Optimizer):
        self._optimizer = optimizer
        # Of all parameters at the last step.
        self._strides: list[tuple[int, ...]] = []

    def fit(self) -> None:
        """Before each step, once the gradients are there."""
        optimizer = self._optimizer
        num_parameters = 0
        strides = []
        for group in optimizer.param_groups:
            if not group.get("fused"):
                continue
            parameters = group["params"]
            num_parameters += len(parameters)
            for parameter in parameters:
                stride = parameter.stride()
                strides.append(stride)
                gradient = parameter.grad
                if gradient is None or gradient.stride() == stride:
                    continue
                if not _lie_alike(parameter.shape, stride, gradient.stride()):
                    parameter.grad = _laid_as(parameter, gradient)
        if strides != self._strides:
            self._strides = strides
            self._lay_state()
        if len(optimizer.state) < num_parameters:
            self._begin_late()

    def _lay_state(self) -> None:
        """The memory format of parameters may have been changed under their state."""
        for parameter, kept in self._optimizer.state.items():
            for name, value in kept.items():
                if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
                    continue
                if not _lie_alike(value.shape, parameter.stride(), value.stride()):
                    kept[name] = _laid_as(parameter, value)

    def _begin_late(self) -> None:
        """Gives a momentum of 0 to parameters whose first gradient comes after that of others.

        It becomes that gradient, as a first momentum is.
        """
        state = self._optimizer.state
        for group in self._optimizer.param_groups:
            if not group.get("fused") or not group.get("momentum"):
                continue
            late = []
            num_begun = 0
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if state.get(parameter, {}).get("momentum_buffer") is None:
                    late.append(parameter)
                else:
                    num_begun += 1
            if num_begun:
                for parameter in late:
                    state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def inputs_of(optimizer: Optimizer) -> FusedInputs | None:
    """Returns what makes an optimizer's inputs fit, None for one that has no fused kernel."""
    return FusedInputs(optimizer) if type(optimizer) in HAVE_FUSED else None


@contextmanager
def as_last_hook(optimizer: Optimizer, call: Callable[[], None]) -> Iterator[None]:
    """Within it an optimizer's step calls `call` after all other hooks, which may change
    gradients."""

    def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        call()

    handle = optimizer.register_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def step_quietly(optimizer: Optimizer, *, inputs: FusedInputs | None = None) -> None:
    """Steps an optimizer without the wrapper in which torch announces it to profiler and hooks.

    That is done only if neither is there, and saves 20 to 30 us.

    Args: `inputs` of one of torch's optimizers, if its kernels may be fused.
    """
    announced = type(optimizer).step
    if not getattr(announced, "hooked", False):
        # A wrapper around another optimizer may lack all that torch's constructor makes.
        optimizer.step()
        return
    own_hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    is_heard = (
        own_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or _profiler_enabled()
    )
    if is_heard:
        if inputs is None:
            optimizer.step()
            return
        with as_last_hook(optimizer, inputs.fit):
            optimizer.step()
        return
    if inputs is not None:
        inputs.fit()
    # As torch's schedulers note a step.
    optimizer._opt_called = True  # type: ignore[attr-defined]
    # The step itself: functools.wraps has set it.
    announced.__wrapped__(optimizer)  # type: ignore[attr-defined]
