"""From a model and its optimizers to `Training`: placing, checking, wrapping.

Owns: everything that happens to a model once, before the first step, but its rehearsal.
Refuses: repairing. An optimizer that does not hold what it should is named and the run ends.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.checkpoint import checkpoint

from ddp_kit.checkpoint.weights import require_equal
from ddp_kit.data.batch_plan import require_subtrees
from ddp_kit.data.loader import Feed
from ddp_kit.data.seeding import forward_key
from ddp_kit.distributed.control_packet import Control
from ddp_kit.distributed.local_shard import local
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, nearest, some
from ddp_kit.metrics import LossSum
from ddp_kit.settings import Precision, Settings
from ddp_kit.setup.dry_run import Rehearsal
from ddp_kit.strategies import choose_strategy
from ddp_kit.strategies.base import Strategy
from ddp_kit.strategies.optimizers import fuse
from ddp_kit.strategies.precision import LossScale
from ddp_kit.training.running_stats import RunningStatistics
from ddp_kit.training.state import LossCall, ObjectiveState, Training


@dataclass(frozen=True, kw_only=True)
class Part:
    """One objective's live parts: its loss, an optimizer over `trains`' parameters, and a scheduler stepped once per step."""

    loss: Callable[[Any, Any], LossSum]
    optimizer: Optimizer
    scheduler: Any = None
    trains: str = ""


def wrap(
    model: nn.Module,
    optimizer: Optimizer,
    loss: Callable[[Any, Any], LossSum],
    *,
    group: Group,
    feed: Feed,
    scheduler: Any = None,
    precision: Precision = "fp32",
    grad_clip: float = 0.0,
    find_unused_parameters: bool = False,
    exact: bool = False,
    tuning: bool = True,
) -> Training:
    """Wraps a model, its optimizer and its loss for a loop of one's own, with DDP. Every rank calls it; see `wrap_parts`."""
    require_equal(model, group=group)
    return wrap_parts(
        model,
        [Part(loss=loss, optimizer=optimizer, scheduler=scheduler)],
        strategy=choose_strategy(
            group, Settings(exact=exact, find_unused_parameters=find_unused_parameters)
        ),
        group=group,
        feed=feed,
        precision=precision,
        grad_clip=grad_clip,
        find_unused_parameters=find_unused_parameters,
        exact=exact,
        tuning=tuning,
    )


def wrap_parts(
    model: nn.Module,
    parts: Sequence[Part],
    *,
    strategy: Strategy,
    group: Group,
    feed: Feed,
    precision: Precision = "fp32",
    grad_clip: float = 0.0,
    find_unused_parameters: bool = False,
    has_checkpointed_activations: bool = False,
    tuning: bool = True,
    exact: bool = False,
) -> Training:
    """Makes a model that lies on its device ready to train. Every rank calls it.

    Args: `model` on the group's device, with equal weights on all ranks (`require_equal`), or as `strategy` has split it; `parts` one or
        more objectives, with optimizers built from that model; `feed` this rank's
        batches, of which one is used for rehearsal; `tuning` gives torch's optimizers their fused kernels; `exact` as in `exactness`,
        with as many CPU threads at any number of ranks.
    Raises: ConfigError or DdpKitError on every rank, naming the parameter or layer, before the first step.
    """
    micro_batches = feed.plan.micro_batches
    if exact:
        require_exact(feed, group)
    training = Training(
        group=group,
        control=Control(group),
        strategy=strategy,
        model=model,
        objectives=[],
        statistics=RunningStatistics(
            model,
            group,
            micro_batches=micro_batches,
            always=has_checkpointed_activations,
            exact=exact,
        ),
        plan=feed.plan,
        forward_key=forward_key(feed.seed),
        grad_clip=grad_clip,
        rounds=max(map(len, map(feed.plan.of_rank, range(group.world_size))))
        if strategy.shards is not None
        else 0,
    )
    rehearsal = Rehearsal(training, feed, allows_unused=find_unused_parameters, exact=exact)
    fused = [fuse(part.optimizer) for part in parts] if tuning else []
    if fused and all(fused):
        training.tuned.append("fused optimizer")
    for part in parts:
        training.objectives.append(
            _objective(part, rehearsal, precision=precision, is_only=len(parts) == 1)
        )
    return training


def _objective(
    part: Part, rehearsal: Rehearsal, *, precision: Precision, is_only: bool
) -> ObjectiveState:
    """Checks, wraps and rehearses one objective."""
    model, group = rehearsal.training.model, rehearsal.training.group
    _check_scheduler(part)
    parameters = _trained(model, part, is_only=is_only)
    own = {id(parameter) for parameter in parameters}
    frozen = [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad and id(parameter) not in own
    ]
    on_device = group.device.type == "cuda" and getattr(
        part.optimizer, "_step_supports_amp_scaling", False
    )
    call = LossCall(model, part.loss, precision=precision, device=group.device)
    wrapped, count = rehearsal.run(call, part.optimizer, parameters, frozen)
    is_plain = wrapped.step is None and rehearsal.training.strategy.shards is None
    place = local(parameters[0]).device
    return ObjectiveState(
        name="" if is_only else f"{part.trains}/",
        call=wrapped.call,
        parameters=parameters,
        frozen=frozen,
        optimizer=part.optimizer,
        scheduler=part.scheduler,
        count=count,
        scale=LossScale.of(precision),
        step=wrapped.step,
        owns=wrapped.owns,
        moments=wrapped.moments,
        refresh=wrapped.refresh,
        found_inf=torch.zeros((), device=place),
        one=torch.ones((), device=place),
        is_mixed=len({parameter.dtype for parameter in parameters}) > 1
        or parameters[0].is_complex(),
        is_deferred=on_device
        and is_only
        and is_plain
        and precision != "fp16",  # the host need not wait for each step's verdict
    )


def _check_scheduler(part: Part) -> None:
    """Raises: ConfigError for a scheduler that would not move this optimizer's rates once per step."""
    if isinstance(part.scheduler, ReduceLROnPlateau):
        raise ConfigError(
            "ReduceLROnPlateau counts evaluations, schedulers here count optimizer steps: take one of ddp_kit.schedules."
        )
    if (
        part.scheduler is not None
        and getattr(part.scheduler, "optimizer", part.optimizer) is not part.optimizer
    ):
        raise ConfigError(
            "the scheduler belongs to another optimizer than the one it was given: build it from the function's argument."
        )


def part_of(model: nn.Module, trains: str) -> nn.Module:
    """Returns the part of a model that an objective trains. Raises: ConfigError if there is none of that name."""
    try:
        return model.get_submodule(trains)
    except AttributeError:
        near = nearest(trains, [name for name, _ in model.named_modules()])
        raise ConfigError(
            f"Objective(trains={trains!r}): the model has no such part.{f' Did you mean {near!r}?' if near else ''}"
        ) from None


def _trained(model: nn.Module, part: Part, *, is_only: bool) -> list[nn.Parameter]:
    """Returns the parameters of an objective. Raises: ConfigError if its optimizer holds none, foreign ones, or not all of them."""
    module = part_of(model, part.trains)
    named = {
        id(p): f"{part.trains}.{name}".lstrip(".")
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    held = {id(p) for parameters in part.optimizer.param_groups for p in parameters["params"]}
    everything = {id(p) for p in model.parameters()}
    kind = type(part.optimizer).__name__
    if not held & set(named):
        what = "parameters that are not this model's" if held else "no parameters"
        raise ConfigError(
            f"the optimizer ({kind}) holds {what}. Build it from the model it is given: {kind}(model.parameters(), ...)."
        )
    if held - everything:
        raise ConfigError(
            f"the optimizer ({kind}) holds {len(held - everything)} tensors that are not parameters of the model."
        )
    missing = [name for identity, name in named.items() if identity not in held]
    if missing:
        raise ConfigError(
            f"the optimizer ({kind}) does not hold {some(missing)}, which the model would train. Give it all of them, or freeze "
            "these with requires_grad_(False)."
        )
    if held & everything - set(named) and not is_only:
        raise ConfigError(
            f"Objective(trains={part.trains!r}): its optimizer ({kind}) also holds parameters outside that part."
        )
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def checkpoint_activations(model: nn.Module, class_name: str) -> None:
    """Makes each module of a class compute its activations again in backward instead of keeping them; names stay as they are.

    Raises: ConfigError if the model has no such module.
    """
    modules = [module for module in model.modules() if type(module).__name__ == class_name]
    if not modules:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        near = nearest(class_name, kinds)
        raise ConfigError(
            f"--activation-checkpointing {class_name}: the model has no module of that class. "
            f"{f'Did you mean {near}?' if near else 'It has ' + ', '.join(kinds) + '.'}"
        )
    for module in modules:
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


def require_exact(feed: Feed, group: Group) -> None:
    """Raises: ConfigError on every rank if a run of this feed on these ranks cannot be exact."""
    if feed.sampler is None:
        raise ConfigError(
            "--exact: the training data is iterable, and its order is its own. Give it __getitem__ and __len__."
        )
    require_subtrees(feed.plan, world_size=group.world_size)
