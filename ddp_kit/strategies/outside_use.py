"""Watchers for weights that are used outside the forward pass of their module.

A strategy that splits weights gathers them where their module is called. Elsewhere a rank has its
rows only (FSDP2) or nothing at all (DeepSpeed's stage 3), and torch computes a wrong number of
that without a word. These modes see the use, and stop the run.
"""

from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ddp_kit.errors import ConfigError

# Methods of a tensor that give a plain number.
NUMBER_READS = {
    "item",
    "tolist",
    "numpy",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
    "__format__",
}
FSDP_MESSAGE = (
    "--fsdp.wrap, --fsdp.wrap-size: the loss or `evaluate` uses weights of a wrapped module "
    "outside its forward pass, where each rank has its rows only. Let the optimizer decay "
    "weights, wrap fewer modules, or type --strategy zero1."
)


@final
class PartialReadGuard(TorchFunctionMode):
    """Watches for numbers that are read off tensors of which this rank has a part.

    torch gives the number of the part, and says nothing.
    """

    def __init__(self, message: str):
        super().__init__()
        self._message = message

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function.

        Raises: ConfigError with the message if it would read such a number.
        """
        if getattr(func, "__name__", "") in NUMBER_READS and _is_part(args[0]):
            raise ConfigError(self._message)
        return func(*args, **(kwargs or {}))


def reads_numbers(optimizer: Optimizer) -> str:
    """Returns what to say of an optimizer that does so with fsdp."""
    return (
        f"--strategy fsdp: {type(optimizer).__name__} reads numbers off weights or gradients that "
        "are split. Type --strategy zero1."
    )


@final
class DerivedReadGuard(TorchFunctionMode):
    """Watches a trial on whole tensors for numbers that are read off them or what is made of them,
    as `PartialReadGuard` does where they are split.
    """

    def __init__(self, message: str):
        super().__init__()
        self._message = message
        # Kept alive, so that no other tensor gets the identity of one of them.
        self._watched: dict[int, torch.Tensor] = {}

    def watch(self, *tensors: torch.Tensor) -> None:
        """Takes tensors that would be split."""
        self._watched |= {id(tensor): tensor for tensor in tensors}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function.

        Raises: ConfigError with the message if it would read such a number.
        """
        result = func(*args, **(kwargs or {}))
        if not any(id(leaf) in self._watched for leaf in tree_leaves((args, kwargs))):
            return result
        if getattr(func, "__name__", "") in NUMBER_READS:
            raise ConfigError(self._message)
        self.watch(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)))
        return result


def _is_part(tensor: Any) -> bool:
    placements = getattr(tensor, "placements", ())
    return any(not placement.is_replicate() for placement in placements)


@final
class EmptyWeightGuard(TorchFunctionMode):
    """Watches a pass at DeepSpeed's stage 3 for weights that are used where they are not gathered.

    They are empty there: a penalty on them would be 0.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        # Kept alive, so that no other tensor gets the identity of one of them.
        self._derived: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function.

        Raises: ConfigError if it makes something of an empty weight: a part of a loss's graph, or
            a number.
        """
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor):
            return result
        name = self._empty_weight_in((args, kwargs))
        if not name:
            return result
        if result.grad_fn is not None or result.numel():
            raise ConfigError(
                f"--deepspeed.stage 3: the loss or `evaluate` uses {name} outside the forward "
                "pass of its module, and weights are gathered there only. Let the optimizer decay "
                "weights, or type --deepspeed.stage 2, or --strategy fsdp."
            )
        # What is made of it, detached for instance, stands for the same weight.
        if id(result) not in self._names:
            self._names[id(result)] = name
            self._derived.append(result)
        return result

    def _empty_weight_in(self, arguments: Any) -> str:
        """Returns the name of the first empty weight among a function's arguments, "" without."""
        for leaf in tree_leaves(arguments):
            if id(leaf) in self._names and not leaf.numel():
                return self._names[id(leaf)]
        return ""
