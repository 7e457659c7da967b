"""Optimizers stepped as fast as torch can, and the memory format of convolutional models."""

import torch
from torch._C._autograd import _profiler_enabled
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def fuse(optimizer: Optimizer, *, thaws: bool = False) -> bool:
    """Switches one of torch's optimizers to its fused kernel. Returns whether it did.

    One that was built with another kernel or has run is left as it is.

    Args: `thaws` whether parameters get their first gradient later than others.
    """
    if not _can_be_fused(optimizer):
        return False
    # Fused SGD takes a momentum of all parameters or of none.
    if thaws and any(group.get("momentum") for group in optimizer.param_groups):
        return False
    for group in optimizer.param_groups:
        group["fused"] = True
    # As its constructor has it for fused=True.
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    return True


def _can_be_fused(optimizer: Optimizer) -> bool:
    if type(optimizer) not in (SGD, Adam, AdamW) or optimizer.state:
        return False
    for group in optimizer.param_groups:
        if group.get("foreach") is not None or group.get("fused") is not None:
            return False
        if group.get("capturable") or group.get("differentiable"):
            return False
        if isinstance(group["lr"], torch.Tensor):
            return False
        if not all(_is_fusable(optimizer, parameter) for parameter in group["params"]):
            return False
    return True


def _is_fusable(optimizer: Optimizer, parameter: torch.Tensor) -> bool:
    # Fused SGD has no rule for DTensors in torch 2.15.
    if type(optimizer) is SGD and hasattr(parameter, "to_local"):
        return False
    return parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")


def step_quietly(optimizer: Optimizer) -> None:
    """Steps an optimizer without the wrapper in which torch announces it to profiler and hooks.

    That is done only if neither is there, and saves 20 to 30 us.
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
        optimizer.step()
        return
    # As torch's schedulers note a step.
    optimizer._opt_called = True  # type: ignore[attr-defined]
    # The step itself: functools.wraps has set it.
    announced.__wrapped__(optimizer)  # type: ignore[attr-defined]
