"""Memory and first values for a model that was built without any, once it is split (`--fsdp.meta`).

Values are drawn module by module, each whole in host memory for a moment: they depend on the seed,
not on the number of ranks. None are guessed: a module that has tensors of its own needs
`reset_parameters`, or a file or checkpoint to read them from.
"""

from typing import Literal

import torch
from torch import nn

from ddp_kit.checkpoint.weights import tie, tied_names
from ddp_kit.data.seeding import Purpose, generators_put_back, key
from ddp_kit.distributed.local_shard import Held, held, local
from ddp_kit.errors import ConfigError, some

Reads = Literal["nothing", "file", "all"]


def materialise(
    model: nn.Module,
    *,
    device: torch.device,
    seed: int,
    reads: Reads,
    offloads: bool = False,
) -> None:
    """Gives a split model on the meta device memory and values. Every rank calls it.

    Args: `reads`: what has its values from elsewhere afterwards, and is 0 until then: all of it (a
        checkpoint), or what a file of weights has, in which buffers with `persistent=False` are
        not; `offloads` keeps parameters in host memory.
    Raises: ConfigError for modules that cannot give values to tensors that nothing else does.
    """
    tied = tied_names(model)
    model.to_empty(device="cpu" if offloads else device)
    # It gave each name memory of its own.
    tie(model, tied)
    owners = _modules_with_tensors(model)
    drawn = _modules_to_draw(owners, reads)
    _require_reset(drawn, reads)
    with torch.no_grad(), generators_put_back():
        for number, (name, module) in enumerate(owners.items()):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                local(tensor).zero_()
            if name in drawn:
                torch.manual_seed((key(seed, Purpose.WEIGHTS) + number) % 2**63)
                _reset(module, _shown(name, module))
            for own, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[own] = buffer.to(device)


def _modules_with_tensors(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if module._parameters or module._buffers
    }


def _modules_to_draw(owners: dict[str, nn.Module], reads: Reads) -> dict[str, nn.Module]:
    """Returns those modules of which not every value comes from elsewhere."""
    if reads == "all":
        return {}
    if reads == "nothing":
        return owners
    return {name: module for name, module in owners.items() if module._non_persistent_buffers_set}


def _require_reset(drawn: dict[str, nn.Module], reads: Reads) -> None:
    silent = []
    for name, module in drawn.items():
        if not hasattr(module, "reset_parameters"):
            silent.append(_shown(name, module))
    if silent:
        file = "type --init-from FILE, or " if reads == "nothing" else ""
        raise ConfigError(
            f"--fsdp.meta: {some(silent)} have tensors of their own that no file gives values to, "
            f"and no reset_parameters() to do so. Add it, or {file}leave --fsdp.meta out."
        )


def _shown(name: str, module: nn.Module) -> str:
    """Returns how a module is called in an error; the model itself has no name."""
    return name or type(module).__name__


def _reset(module: nn.Module, name: str) -> None:
    """Draws a module's own values on whole tensors, and keeps this rank's rows.

    Raises: ConfigError if `reset_parameters` leaves a buffer as it was.
    """
    parameters = dict(module._parameters)
    before = {
        own: (buffer, buffer._version)
        for own, buffer in module._buffers.items()
        if buffer is not None
    }
    for own, parameter in parameters.items():
        if parameter is not None:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype)
            module._parameters[own] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    module.reset_parameters()  # type: ignore[operator]  # `_require_reset` has looked: it is there
    left = [
        own
        for own, (buffer, version) in before.items()
        if module._buffers[own] is buffer and buffer._version == version
    ]
    if left:
        raise ConfigError(
            f"--fsdp.meta: {name} has buffers that its reset_parameters() gives no values: "
            f"{some(left)}. Let it, or leave --fsdp.meta out."
        )
    for own, parameter in parameters.items():
        drawn = module._parameters[own]
        if parameter is None or drawn is None:
            continue
        rows = held(parameter)
        # FSDP2's.
        assert isinstance(rows, Held)
        rows.rows.copy_(drawn.detach()[rows.start : rows.stop])
        module._parameters[own] = parameter
