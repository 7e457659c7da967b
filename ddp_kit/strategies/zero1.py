"""ZeRO stage 1: DDP, with the optimizer's state split over the ranks by whole parameters.

Owns: torch's ZeroRedundancyOptimizer around the recipe's own optimizer, whose class and parameter groups it takes over.
Refuses: its checkpoints: `consolidate_state_dict` gathers everything on one rank and unpickles a peer's bytes, `state_dict` may be stale,
`load_state_dict` changes its argument. Each rank saves what it owns under parameter names, and a restore takes what it owns then.

Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, arXiv 1910.02054.
"""

import inspect
from contextlib import AbstractContextManager
from typing import Any, final

from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, some
from ddp_kit.strategies.checks import require_separate
from ddp_kit.strategies.ddp import DataParallel
from ddp_kit.strategies.whole import Whole, Wrapped, arguments_of

PLAIN = (bool, int, float, str, tuple)  # what is compared of an optimizer's own attributes


@final
class ZeroOne(Whole):
    """Each rank steps its own parameters, and sends them to the others."""

    def __init__(self, group: Group, ddp: DataParallel):
        self._group, self._ddp = group, ddp
        self._bucketed: set[int] = (
            set()
        )  # parameters that lie in an optimizer's buckets; one that two objectives train can be in one only
        self.divisor = ddp.divisor

    def wrap(self, call: nn.Module, optimizer: Optimizer) -> Wrapped:
        """Returns `call` in DDP's wrapper. The recipe's optimizer keeps its parameter groups, which schedulers move, and its `state`
        becomes that of this rank's parameters.

        Raises: ConfigError for an optimizer that cannot be built again from its groups.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        zero = rebuilt(optimizer, self._group, in_buckets=not held & self._bucketed)
        self._bucketed |= held
        zero.param_groups = (
            optimizer.param_groups
        )  # not copies: schedulers hold the recipe's optimizer
        optimizer.state = zero.optim.state
        for name in (
            "_optimizer_step_pre_hooks",
            "_optimizer_step_post_hooks",
        ):  # what the recipe has registered, and will
            setattr(zero.optim, name, getattr(optimizer, name))
        own = {id(parameter) for group in zero.optim.param_groups for parameter in group["params"]}
        self._group.closing.callback(_release, zero)
        return Wrapped(
            call=self._ddp.ddp(call), step=zero.step, owns=lambda parameter: id(parameter) in own
        )

    def micro_batch(self, wrapped: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """DDP's."""
        return self._ddp.micro_batch(wrapped, is_last=is_last)


def rebuilt(optimizer: Optimizer, group: Group, *, in_buckets: bool = True) -> Any:
    """Returns the ZeroRedundancyOptimizer that steps what an optimizer would; `in_buckets` sends one message a rank, not one a parameter.

    Raises: ConfigError if there is none.
    """
    kind, parameters = (
        type(optimizer),
        [parameter for own in optimizer.param_groups for parameter in own["params"]],
    )
    known = inspect.signature(kind.__init__).parameters
    groups = [
        {key: value for key, value in own.items() if key == "params" or key in known}
        for own in optimizer.param_groups
    ]
    if optimizer.state:
        raise ConfigError(
            f"--strategy zero1: the optimizer ({kind.__name__}) has state before the first step, which cannot be split."
        )
    require_separate(optimizer)
    try:
        zero = ZeroRedundancyOptimizer(
            groups,
            optimizer_class=kind,
            process_group=group.training,
            parameters_as_bucket_view=in_buckets
            and all(parameter.is_contiguous() for parameter in parameters),
            **arguments_of(optimizer),
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"--strategy zero1: torch's ZeroRedundancyOptimizer cannot build {kind.__name__} for a rank's own parameters: {error}. "
            "Type --strategy ddp, or fsdp."
        ) from error
    unlike = [
        name
        for name, value in vars(optimizer).items()
        if isinstance(value, PLAIN) and vars(zero.optim).get(name, value) != value
    ]
    if unlike := [name for name in unlike if not name.startswith("_")]:
        raise ConfigError(
            f"--strategy zero1: {kind.__name__} is built again for a rank's own parameters, from what is in its groups, and {some(unlike)} "
            f"would not be {some([repr(getattr(optimizer, name)) for name in unlike])}. Type --strategy ddp, or fsdp."
        )
    lost = [
        key
        for own in optimizer.param_groups
        for key in own
        if key not in (*zero.optim.param_groups[0], "params", "param_names")
    ]
    if lost and not all(key.startswith("initial_") for key in lost):
        raise ConfigError(
            f"--strategy zero1: {kind.__name__} does not take {some(sorted(set(lost)))}, which its groups have, as arguments."
        )
    return zero


def _release(zero: Any) -> None:
    """Lets go of the process group, which must be gone before it is destroyed."""
    zero.process_group = None
