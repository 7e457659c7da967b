"""From a model and its optimizers to `Training`: checked, run dry and wrapped, once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ddp_kit.checkpoint.resume import told_data
from ddp_kit.checkpoint.weights import require_equal
from ddp_kit.data.batch_plan import BatchPlan, require_subtrees
from ddp_kit.data.loader import Feed
from ddp_kit.data.seeding import forward_key
from ddp_kit.distributed.control_packet import ControlPacket
from ddp_kit.distributed.local_shard import local
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.io.logs import logger
from ddp_kit.metrics import LossSum
from ddp_kit.model_state.attributes import attribute_note
from ddp_kit.model_state.forward_state import ForwardState
from ddp_kit.settings import Precision, Settings
from ddp_kit.setup.buffer_words import words_by_name
from ddp_kit.setup.dry_run import DryRun
from ddp_kit.setup.frozen_words import Frozen, FrozenNames, freeze_for_good, frozen_names
from ddp_kit.setup.parts import Part, check_scheduler, trained_by
from ddp_kit.strategies import choose_strategy
from ddp_kit.strategies.base import Strategy
from ddp_kit.strategies.fused_step import fuse
from ddp_kit.strategies.precision import LossScale
from ddp_kit.training.freezing import Freezing, GradientFlags
from ddp_kit.training.optimizer_marks import marks_of
from ddp_kit.training.state import LossCall, ObjectiveState, Training
from ddp_kit.watchdog.watch import watch


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
    buffers: Mapping[str, str] | None = None,
    frozen: Frozen = (),
) -> Training:
    """Wraps a model, its optimizer and its loss for a loop of one's own, with DDP.

    Every rank calls it; see `wrap_parts`, also for what it raises. `buffers` and `frozen` are
    those of Recipe; `exact` wants `process_group(threads=...)` on a CPU.
    """
    watch(group)
    require_equal(model, group=group)
    freeze_for_good(model, frozen)
    if exact and group.device.type == "cpu" and not group.has_stated_threads:
        raise ConfigError(
            "wrap(exact=True): sums depend on a rank's number of CPU threads, which follows from "
            "cores and ranks here. State it: process_group(threads=1)."
        )
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
        buffers=buffers,
        frozen_in=frozen_names(model, frozen, parts=[""], feed=feed, group=group),
    )
    training.data = told_data(feed, world_size=group.world_size)
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
    buffers: Mapping[str, str] | None = None,
    frozen_in: FrozenNames | None = None,
    may_split: bool = False,
) -> Training:
    """Makes a model that lies on its device ready to train. Every rank calls it.

    Args: `model` on the group's device, with equal weights on all ranks (`require_equal`), or as
        `strategy` has split it; `parts` objectives, with optimizers built from that model; `feed`
        this rank's batches, one of which is for the dry run; `tuning` gives torch's optimizers
        their fused kernels; `exact` as `--exact`, with as many CPU threads at any number of ranks;
        `buffers` as Recipe has it; `frozen_in` what is frozen in which epoch; `may_split` whether
        ranks will hold parts of the weights where there are several.
    Raises: ConfigError or DdpKitError on every rank before the first step, naming what it is.
    """
    if exact:
        require_exact(feed, group)
    packet = ControlPacket(group)
    is_split = strategy.shards is not None
    training = Training(
        group=group,
        control_packet=packet,
        strategy=strategy,
        model=model,
        objectives=[],
        forward_state=ForwardState(
            model,
            group,
            feed.plan,
            control_packet=packet,
            words=words_by_name(model, buffers or {}),
            is_whole=not is_split,
            always=has_checkpointed_activations,
            exact=exact,
        ),
        flags=GradientFlags(model),
        plan=feed.plan,
        cursor=feed.cursor,
        grad_clip=grad_clip,
        rounds=_most_micro_batches(feed.plan, group.world_size) if is_split else 0,
    )
    dry_run = DryRun(
        training, feed, allows_unused=find_unused_parameters, may_split=may_split or is_split
    )
    if tuning:
        training.tuned += _fused(parts)
    _add_objectives(parts, dry_run, precision=precision, seed=feed.seed, frozen_in=frozen_in)
    return training


def require_exact(feed: Feed, group: Group) -> None:
    """Raises: ConfigError on every rank if a run of this feed on these ranks cannot be exact."""
    if feed.sampler is None:
        raise ConfigError(
            "--exact: the training data is iterable, and its order is its own. "
            "Give it __getitem__ and __len__."
        )
    require_subtrees(feed.plan, world_size=group.world_size)


def _fused(parts: Sequence[Part]) -> list[str]:
    """Gives torch's optimizers their fused kernels. Returns what to say of it."""
    fused = [fuse(part.optimizer) for part in parts]
    return ["fused optimizer"] if fused and all(fused) else []


def _most_micro_batches(plan: BatchPlan, world_size: int) -> int:
    """Returns the micro-batches of the rank that has most."""
    return max(len(plan.of_rank(rank)) for rank in range(world_size))


def _add_objectives(
    parts: Sequence[Part],
    dry_run: DryRun,
    *,
    precision: Precision,
    seed: int,
    frozen_in: FrozenNames | None,
) -> None:
    """Makes the objectives in order, and notes what their passes were seen to change."""
    for i, part in enumerate(parts):
        draws = forward_key(seed, objective=i)
        objective = _objective(
            part, dry_run, precision=precision, is_only=len(parts) == 1, draws=draws
        )
        dry_run.training.objectives.append(objective)
    training = dry_run.training
    training.flags.note(training.objectives)
    if frozen_in is not None:
        training.freezing = Freezing(training.model, frozen_in, renew=dry_run.renew)
    changed = [attribute.name for attribute in training.forward_state.attributes.attributes]
    if changed:
        training.notes.append(attribute_note(changed))


def _objective(
    part: Part, dry_run: DryRun, *, precision: Precision, is_only: bool, draws: int
) -> ObjectiveState:
    """Checks one objective, runs it dry and wraps it. Args: `draws` its `forward_key`."""
    training = dry_run.training
    model = training.model
    device = training.group.device
    on_cuda = device.type == "cuda"
    check_scheduler(part)
    parameters = trained_by(model, part, is_only=is_only)
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
        bare=call,
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
        may_draw=not type(part.optimizer).__module__.startswith("torch.optim"),
    )
