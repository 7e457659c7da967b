"""Giving memory and first values to a model that was built without any, once it has been split (`--fsdp.meta`).

Owns: the values, drawn module by module, each whole in host memory for a moment: they depend on the seed, not on the number of ranks.
Refuses: guessing values: a module that has tensors of its own needs `reset_parameters`, or a file or checkpoint to read them from.
"""

from typing import Literal

import torch
from torch import nn

from ddp_kit.checkpoint.weights import tie, tied_names
from ddp_kit.data.seeding import Purpose, generators_put_back, key
from ddp_kit.distributed.local_shard import Held, held, local
from ddp_kit.errors import ConfigError, some


def materialise(
    model: nn.Module,
    *,
    device: torch.device,
    seed: int,
    reads: Literal["nothing", "file", "all"],
    offloads: bool = False,
) -> None:
    """Gives a split model on the meta device memory and values. Every rank calls it.

    Args: `reads`: what has its values from elsewhere afterwards, and is 0 until then: all of it (a checkpoint), or what a file of weights
        has, in which buffers with `persistent=False` are not; `offloads` keeps parameters in host memory.
    Raises: ConfigError for modules that cannot give values to tensors that nothing else does.
    """
    tied = tied_names(model)
    model.to_empty(device="cpu" if offloads else device)
    tie(model, tied)  # it gave each name memory of its own
    owners = {
        name: module
        for name, module in model.named_modules()
        if module._parameters or module._buffers
    }
    if reads == "file":
        drawn = {
            name: module for name, module in owners.items() if module._non_persistent_buffers_set
        }
    else:
        drawn = owners if reads == "nothing" else {}
    silent = [
        name or type(model).__name__
        for name, module in drawn.items()
        if not hasattr(module, "reset_parameters")
    ]
    if silent:
        raise ConfigError(
            f"--fsdp.meta: {some(silent)} have tensors of their own that no file gives values to, and no reset_parameters() to do so. "
            f"Add it, or {'type --init-from FILE, or ' if reads == 'nothing' else ''}leave --fsdp.meta out."
        )
    with torch.no_grad(), generators_put_back():
        for number, (name, module) in enumerate(owners.items()):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                local(tensor).zero_()
            if name in drawn:
                torch.manual_seed((key(seed, Purpose.WEIGHTS) + number) % 2**63)
                _reset(module, name or type(model).__name__)
            for own, buffer in module._buffers.items():
                module._buffers[own] = buffer.to(device) if buffer is not None else None


def _reset(module: nn.Module, name: str) -> None:
    """Draws a module's own values on whole tensors, and keeps this rank's rows. Raises: ConfigError if it leaves a buffer as it was."""
    parts = dict(module._parameters)
    before = {
        own: (buffer, buffer._version)
        for own, buffer in module._buffers.items()
        if buffer is not None
    }
    for own, parameter in parts.items():
        if parameter is not None:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype)
            module._parameters[own] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    module.reset_parameters()  # type: ignore[operator]  # `materialise` has looked: it is there
    left = [
        own
        for own, (buffer, version) in before.items()
        if module._buffers[own] is buffer and buffer._version == version
    ]
    if left:
        raise ConfigError(
            f"--fsdp.meta: {name} has buffers that its reset_parameters() gives no values: {some(left)}. Let it, or leave --fsdp.meta out."
        )
    for own, parameter in parts.items():
        drawn = module._parameters[own]
        if parameter is not None and drawn is not None:
            place = held(parameter)
            assert isinstance(place, Held)  # FSDP2's
            place.rows.copy_(drawn.detach()[place.start : place.stop])
            module._parameters[own] = parameter
