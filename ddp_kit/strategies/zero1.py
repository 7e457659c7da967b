"""ZeRO stage 1: DDP, with the optimizer's state split over the ranks by whole parameters.

torch's ZeroRedundancyOptimizer stands around the recipe's own optimizer, whose class and parameter
groups it takes over. Its checkpoints are not used: `consolidate_state_dict` gathers everything on
one rank and unpickles a peer's bytes, `state_dict` may be stale, `load_state_dict` changes its
argument. Each rank saves what it owns under parameter names, and a restore takes what it owns then.

Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models,
arXiv 1910.02054.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, final

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from ddp_kit.distributed.local_shard import Item, held
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, some
from ddp_kit.strategies.checks import require_separate
from ddp_kit.strategies.ddp import DataParallel
from ddp_kit.strategies.fused_step import as_last_hook, inputs_of
from ddp_kit.strategies.optimizer_view import (
    State,
    empty_as_torch_has_it,
    kept_states,
    replace_states,
)
from ddp_kit.strategies.whole import Whole, Wrapped, arguments_of

# Types of an optimizer's own attributes that are compared with those of the one built again.
PLAIN = (bool, int, float, str, tuple)


@final
class ZeroOne(Whole):
    """Each rank steps its own parameters, and sends them to the others."""

    def __init__(self, group: Group, ddp: DataParallel):
        self._group = group
        self._ddp = ddp
        # Parameters that lie in an optimizer's buckets. One that two objectives train can be in
        # one only.
        self._bucketed: set[int] = set()
        self._optimizers: list[Any] = []
        self.divisor = ddp.divisor

    def wrap(self, call: nn.Module, optimizer: Optimizer) -> Wrapped:
        """Returns `call` in DDP's wrapper.

        The recipe's optimizer keeps its parameter groups, which schedulers move, and its `state`
        becomes that of this rank's parameters.

        Raises: ConfigError for an optimizer that cannot be built again from its groups.
        """
        held = {id(parameter) for parameter in _parameters_of(optimizer)}
        zero = rebuilt(optimizer, self._group, in_buckets=not held & self._bucketed)
        self._bucketed |= held
        # No copies of the groups, nor of the hooks that the recipe has registered and will:
        # schedulers hold the recipe's optimizer.
        zero.param_groups = optimizer.param_groups
        optimizer.state = zero.optim.state
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(zero.optim, name, getattr(optimizer, name))
        self._optimizers.append(zero)
        self._group.closing.callback(_release, zero)
        return Wrapped(call=self._ddp.ddp(call), optimizer_view=ZeroOneOptimizer(optimizer, zero))

    def renew(self, wrapped: nn.Module) -> nn.Module:
        """DDP's. Owners go on sending all that they step, frozen or not."""
        for zero in self._optimizers:
            # Else it would lay parameters into other memory, and warn of it.
            zero._is_trainable_mask = zero._get_is_trainable_mask()
        return self._ddp.renew(wrapped)

    def micro_batch(self, wrapped: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """DDP's."""
        return self._ddp.micro_batch(wrapped, is_last=is_last)


@final
class ZeroOneOptimizer:
    """Each rank keeps the whole state of its own parameters."""

    has_all = False
    has_whole = False
    heeds_found_inf = False

    def __init__(self, optimizer: Optimizer, zero: Any):
        """`optimizer` has the groups, and the state that `zero` steps by."""
        self.stepped: Optimizer = zero.optim
        self._optimizer = optimizer
        self._zero = zero
        self._inputs = inputs_of(zero.optim)
        self._own = {id(parameter) for parameter in _parameters_of(zero.optim)}

    def step(self) -> None:
        """See OptimizerView. The owners send what they have stepped to the others."""
        if self._inputs is None:
            self._zero.step()
            return
        with as_last_hook(self._zero.optim, self._inputs.fit):
            self._zero.step()

    def items(self) -> Iterator[tuple[nn.Parameter, State]]:
        """See OptimizerView."""
        yield from kept_states(self._optimizer)

    def part(self, parameter: nn.Parameter, tensor: torch.Tensor) -> Item:
        """See OptimizerView. All of it is here, and nowhere else."""
        return held(tensor)

    def empty(
        self, parameter: nn.Parameter, *, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """See OptimizerView."""
        if id(parameter) not in self._own:
            return torch.empty(shape, dtype=dtype, device="meta")
        return empty_as_torch_has_it(self._optimizer, parameter, shape=shape, dtype=dtype)

    def restore(self, states: Mapping[nn.Parameter, State]) -> None:
        """See OptimizerView."""
        own = {key: state for key, state in states.items() if id(key) in self._own}
        replace_states(self._optimizer, own)


def rebuilt(optimizer: Optimizer, group: Group, *, in_buckets: bool = True) -> Any:
    """Returns the ZeroRedundancyOptimizer that steps what an optimizer would.

    `in_buckets` sends one message a rank, not one a parameter.

    Raises: ConfigError if there is none.
    """
    kind = type(optimizer)
    if optimizer.state:
        raise ConfigError(
            f"--strategy zero1: the optimizer ({kind.__name__}) has state before the first step, "
            "which cannot be split."
        )
    require_separate(optimizer)
    are_contiguous = all(parameter.is_contiguous() for parameter in _parameters_of(optimizer))
    try:
        zero = ZeroRedundancyOptimizer(
            _groups_for(optimizer),
            optimizer_class=kind,
            process_group=group.pg,
            parameters_as_bucket_view=in_buckets and are_contiguous,
            **arguments_of(optimizer),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"--strategy zero1: torch's ZeroRedundancyOptimizer cannot build {kind.__name__} for "
            f"a rank's own parameters: {error}. Type --strategy ddp, or fsdp."
        ) from error
    _require_same_attributes(optimizer, zero)
    _require_same_keys(optimizer, zero)
    return zero


def _parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


def _groups_for(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns an optimizer's groups with what its constructor knows."""
    known = {"params", *inspect.signature(type(optimizer).__init__).parameters}

    def restricted(group: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in group.items() if key in known}

    return [restricted(group) for group in optimizer.param_groups]


def _require_same_attributes(optimizer: Optimizer, zero: Any) -> None:
    """Raises: ConfigError for numbers and the like that the optimizer has outside its groups."""
    again = vars(zero.optim)
    unlike = []
    for name, value in vars(optimizer).items():
        if name.startswith("_") or not isinstance(value, PLAIN):
            continue
        if again.get(name, value) != value:
            unlike.append(name)
    if unlike:
        values = [repr(getattr(optimizer, name)) for name in unlike]
        raise ConfigError(
            f"--strategy zero1: {type(optimizer).__name__} is built again for a rank's own "
            f"parameters, from what is in its groups, and {some(unlike)} would not be "
            f"{some(values)}. Type --strategy ddp, or fsdp."
        )


def _require_same_keys(optimizer: Optimizer, zero: Any) -> None:
    """Raises: ConfigError for keys of groups that would be lost, but for those of schedulers."""
    kept = {*zero.optim.param_groups[0], "params", "param_names"}
    lost: set[str] = set()
    for group in optimizer.param_groups:
        lost |= group.keys() - kept
    if not all(key.startswith("initial_") for key in lost):
        raise ConfigError(
            f"--strategy zero1: {type(optimizer).__name__} does not take {some(sorted(lost))}, "
            "which its groups have, as arguments."
        )


def _release(zero: Any) -> None:
    """Lets go of the process group, which must be gone before it is destroyed."""
    zero.process_group = None
