"""What modules keep by `get_extra_state`, as layers with scales of their own for fp8 do.

It is saved if it is tensors and plain data. What a module makes of it in `set_extra_state` is the
module's own code.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ddp_kit.checkpoint.format.encoding import decode, encode, references
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.errors import ConfigError, some


def extra_states(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Returns the extra state of each module that has one, by its name, as JSON values; its tensors
    go into `tensors`.

    Raises: ConfigError for one that is not tensors and plain data, or cannot be given back.
    """
    states = {}
    for name, module in _with_extra_state(model):
        if type(module).set_extra_state is nn.Module.set_extra_state:
            raise ConfigError(
                f"{_called(name)} ({type(module).__name__}) has get_extra_state and no "
                "set_extra_state, by which a run that goes on would give its state back."
            )
        found: dict[str, torch.Tensor] = {}
        states[name] = encode(module.get_extra_state(), found, name=f"extra/{name}")
        tensors |= found
    return states


def require_same_modules(saved: Mapping[str, Any], model: nn.Module, *, where: str) -> None:
    """Raises: ConfigError if other modules had an extra state than have one now."""
    here = {name for name, _ in _with_extra_state(model)}
    unlike = sorted(here ^ saved.keys())
    if unlike:
        raise ConfigError(
            f"{where} does not fit; nothing was loaded: get_extra_state is there or here alone "
            f"with {some([_called(name) for name in unlike])}."
        )


def restore_extra(
    saved: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Gives modules their extra state back."""
    for name, state in saved.items():
        model.get_submodule(name).set_extra_state(decode(state, tensors))


def put_extra(opened: Opened, model: nn.Module) -> None:
    """Gives modules a checkpoint's extra state, where nothing else of it was read.

    Raises: ConfigError if other modules had one than have one now.
    """
    if "extra" not in opened.values:
        return
    saved = opened.values["extra"]
    require_same_modules(saved, model, where=opened.folder)
    restore_extra(saved, model, {name: opened.tensor(name) for name in references(saved)})


@contextmanager
def extra_of(opened: Opened, model: nn.Module) -> Iterator[None]:
    """Gives modules a checkpoint's extra state while it lasts, and their own back at the end."""
    saved = opened.values.get("extra", {})
    modules = dict(_with_extra_state(model))
    last = {name: copy.deepcopy(modules[name].get_extra_state()) for name in saved}
    restore_extra(saved, model, {name: opened.tensor(name) for name in references(saved)})
    try:
        yield
    finally:
        for name, state in last.items():
            modules[name].set_extra_state(state)


def _with_extra_state(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield name, module


def _called(name: str) -> str:
    return name or "the model"
