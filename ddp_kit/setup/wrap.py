"""From a model and its optimizers to `Training`: checked, run dry and wrapped, once.

Nothing is repaired here: an optimizer that does not hold what it should is named and the run ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ddp_kit.checkpoint.weights import require_equal
from ddp_kit.data.batch_plan import BatchPlan, require_subtrees
from ddp_kit.data.loader import Feed
from ddp_kit.data.seeding import forward_key
from ddp_kit.distributed.control_packet import ControlPacket
from ddp_kit.distributed.local_shard import local
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, nearest, some
from ddp_kit.io.logs import logger
from ddp_kit.metrics import LossSum
from ddp_kit.settings import Precision, Settings
from ddp_kit.setup.dry_run import DryRun
from ddp_kit.strategies import choose_strategy
from ddp_kit.strategies.base import Strategy
from ddp_kit.strategies.fused_step import fuse
from ddp_kit.strategies.precision import LossScale
from ddp_kit.training.optimizer_marks import marks_of
from ddp_kit.training.running_stats import RunningStatistics
from ddp_kit.training.state import LossCall, ObjectiveState, Training


@dataclass(frozen=True, kw_only=True)
class Part:
    """One objective's live parts.

    They are its loss, an optimizer over `trains`' parameters, and a scheduler stepped once per
    step.
    """

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
    """Wraps a model, its optimizer and its loss for a loop of one's own, with DDP.

    Every rank calls it; see `wrap_parts`, also for what it raises.
    """
    require_equal(model, group=group)
    settings = Settings(exact=exact, find_unused_parameters=find_unused_parameters)
    training = wrap_parts(
        model,
        [Part(loss=loss, optimizer=optimizer, scheduler=scheduler)],
        strategy=choose_strategy(group, settings),
        group=group,
        feed=feed,
        precision=precision,
        grad_clip=grad_clip,
        find_unused_parameters=find_unused_parameters,
        exact=exact,
        tuning=tuning,
    )
    if group.rank == 0:
        for note in training.notes:
            logger.warning("note: %s", note)
    return training


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

    Args: `model` on the group's device, with equal weights on all ranks (`require_equal`), or as
        `strategy` has split it; `parts` one or more objectives, with optimizers built from that
        model; `feed` this rank's batches, of which one is used for the dry run; `tuning` gives
        torch's optimizers their fused kernels; `exact` as `--exact`, with as many CPU threads at
        any number of ranks.
    Raises: ConfigError or DdpKitError on every rank, naming the parameter or layer, before the
        first step.
    """
    if exact:
        require_exact(feed, group)
    statistics = RunningStatistics(
        model,
        group,
        micro_batches=feed.plan.micro_batches,
        always=has_checkpointed_activations,
        exact=exact,
    )
    is_split = strategy.shards is not None
    training = Training(
        group=group,
        control_packet=ControlPacket(group),
        strategy=strategy,
        model=model,
        objectives=[],
        statistics=statistics,
        plan=feed.plan,
        cursor=feed.cursor,
        grad_clip=grad_clip,
        rounds=_most_micro_batches(feed.plan, group.world_size) if is_split else 0,
    )
    dry_run = DryRun(training, feed, allows_unused=find_unused_parameters, exact=exact)
    fused = []
    if tuning:
        fused = [fuse(part.optimizer) for part in parts]
    if fused and all(fused):
        training.tuned.append("fused optimizer")
    for i, part in enumerate(parts):
        draws = forward_key(feed.seed, objective=i)
        training.objectives.append(
            _objective(part, dry_run, precision=precision, is_only=len(parts) == 1, draws=draws)
        )
    return training


def require_exact(feed: Feed, group: Group) -> None:
    """Raises: ConfigError on every rank if a run of this feed on these ranks cannot be exact."""
    if feed.sampler is None:
        raise ConfigError(
            "--exact: the training data is iterable, and its order is its own. "
            "Give it __getitem__ and __len__."
        )
    require_subtrees(feed.plan, world_size=group.world_size)


def _most_micro_batches(plan: BatchPlan, world_size: int) -> int:
    """Returns the micro-batches of the rank that has most."""
    return max(len(plan.of_rank(rank)) for rank in range(world_size))


def _objective(
    part: Part, dry_run: DryRun, *, precision: Precision, is_only: bool, draws: int
) -> ObjectiveState:
    """Checks one objective, runs it dry and wraps it. Args: `draws` its `forward_key`."""
    training = dry_run.training
    model = training.model
    device = training.group.device
    on_cuda = device.type == "cuda"
    _check_scheduler(part)
    parameters = _trained(model, part, is_only=is_only)
    own = {id(parameter) for parameter in parameters}
    frozen = [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad and id(parameter) not in own
    ]
    call = LossCall(model, part.loss, precision=precision, device=device)
    wrapped, count = dry_run.run(
        call, part.optimizer, parameters, frozen, forward_key=draws, trains=part.trains
    )
    dtypes = {parameter.dtype for parameter in parameters}
    place = local(parameters[0]).device
    view = wrapped.optimizer_view
    return ObjectiveState(
        name="" if is_only else f"{part.trains}/",
        model=model,
        call=wrapped.call,
        parameters=parameters,
        frozen=frozen,
        optimizer=part.optimizer,
        optimizer_view=view,
        scheduler=part.scheduler,
        count=count,
        marks=replace(marks_of(view.stepped), groups=marks_of(part.optimizer).groups),
        forward_key=draws,
        scale=LossScale.of(precision),
        found_inf=torch.zeros((), device=place),
        one=torch.ones((), device=place),
        is_mixed=len(dtypes) > 1 or parameters[0].is_complex(),
        # The host need not wait for each step's verdict.
        is_deferred=view.heeds_found_inf and on_cuda and is_only and precision != "fp16",
        may_draw=not type(part.optimizer).__module__.startswith("torch.optim."),
    )


def _check_scheduler(part: Part) -> None:
    """Raises: ConfigError for a scheduler that would not move this optimizer's rates every step."""
    scheduler = part.scheduler
    if scheduler is None:
        return
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(
            "ReduceLROnPlateau counts evaluations, schedulers here count optimizer steps: "
            "take one of ddp_kit.schedules."
        )
    if getattr(scheduler, "optimizer", part.optimizer) is not part.optimizer:
        raise ConfigError(
            "the scheduler belongs to another optimizer than the one it was given: "
            "build it from the function's argument."
        )


def part_of(model: nn.Module, trains: str) -> nn.Module:
    """Returns the part of a model that an objective trains.

    Raises: ConfigError if there is none of that name.
    """
    try:
        return model.get_submodule(trains)
    except AttributeError:
        near = nearest(trains, [name for name, _ in model.named_modules()])
        advice = f" Did you mean {near!r}?" if near else ""
        raise ConfigError(
            f"Objective(trains={trains!r}): the model has no such part.{advice}"
        ) from None


def _trained(model: nn.Module, part: Part, *, is_only: bool) -> list[nn.Parameter]:
    """Returns the parameters of an objective.

    Raises: ConfigError if its optimizer holds none, foreign ones, or not all of them.
    """
    module = part_of(model, part.trains)
    trained = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            trained[id(parameter)] = f"{part.trains}.{name}".lstrip(".")
    _check_optimizer(model, part, trained, is_only=is_only)
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _check_optimizer(
    model: nn.Module, part: Part, trained: dict[int, str], *, is_only: bool
) -> None:
    """Compares what an optimizer holds with what it should: names of parameters by their `id`."""
    kind = type(part.optimizer).__name__
    every = {id(parameter) for parameter in model.parameters()}
    held: set[int] = set()
    for group in part.optimizer.param_groups:
        held.update(id(parameter) for parameter in group["params"])
    if not held & trained.keys():
        what = "parameters that are not this model's" if held else "no parameters"
        raise ConfigError(
            f"the optimizer ({kind}) holds {what}. "
            f"Build it from the model it is given: {kind}(model.parameters(), ...)."
        )
    if held - every:
        raise ConfigError(
            f"the optimizer ({kind}) holds {len(held - every)} tensors that are not parameters "
            "of the model."
        )
    missing = [name for identity, name in trained.items() if identity not in held]
    if missing:
        raise ConfigError(
            f"the optimizer ({kind}) does not hold {some(missing)}, which the model would train. "
            "Give it all of them, or freeze these with requires_grad_(False)."
        )
    if held & every - trained.keys() and not is_only:
        raise ConfigError(
            f"Objective(trains={part.trains!r}): its optimizer ({kind}) also holds parameters "
            "outside that part."
        )
