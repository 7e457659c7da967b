"""Giving memory and first values to a model that was built without any, once it has been split (`--fsdp.meta`).

Owns: the values, drawn module by module, each whole in host memory for a moment: they depend on the seed, not on the number of ranks.
Refuses: guessing values: a module that has tensors of its own needs `reset_parameters`, or a file or checkpoint to read them from.
"""

import torch
from torch import nn

from ddp_kit.errors import ConfigError, some
from ddp_kit.seeding import Purpose, generators_put_back, key
from ddp_kit.sharded import Held, held, local
from ddp_kit.weights import tied_names


def materialise(model: nn.Module, *, device: torch.device, seed: int, reads_values: bool) -> None:
    """Gives a split model on the meta device memory and values. Every rank calls it.

    Args: `reads_values`: they come from a file or a checkpoint afterwards; until then they are 0.
    Raises: ConfigError for modules that cannot draw their values, if none are read.
    """
    tied = tied_names(model)
    model.to_empty(device=device)
    for alias, name in tied.items():  # it gave each name memory of its own
        owner, _, attribute = alias.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_parameter(name))
    owners = {name: module for name, module in model.named_modules() if module._parameters or module._buffers}
    silent = [name or type(model).__name__ for name, module in owners.items() if not hasattr(module, "reset_parameters")]
    if silent and not reads_values:
        raise ConfigError(
            f"--fsdp.meta: {some(silent)} have tensors of their own and no reset_parameters() to give them values. Add it, or type "
            "--init-from FILE, or leave --fsdp.meta out."
        )
    with torch.no_grad(), generators_put_back():
        for number, module in enumerate(owners.values()):
            if reads_values:
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    local(tensor).zero_()
            else:
                torch.manual_seed((key(seed, Purpose.WEIGHTS) + number) % 2**63)
                _reset(module)


def _reset(module: nn.Module) -> None:
    """Draws a module's own values on whole tensors, and keeps this rank's rows."""
    parts = dict(module._parameters)
    for name, parameter in parts.items():
        if parameter is not None:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype)
            module._parameters[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    module.reset_parameters()  # type: ignore[operator]  # `materialise` has looked: it is there
    for name, parameter in parts.items():
        drawn = module._parameters[name]
        if parameter is not None and drawn is not None:
            place = held(parameter)
            assert isinstance(place, Held)  # FSDP2's
            place.rows.copy_(drawn.detach()[place.start : place.stop])
            module._parameters[name] = parameter
