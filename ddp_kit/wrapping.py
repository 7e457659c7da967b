"""From a model and its optimizers to `Training`: placing, checking, wrapping, rehearsing.

Owns: everything that happens to a model once, before the first step, and the faults that show there.
Refuses: repairing. A parameter that no optimizer trains, or that gets no gradient, is named and the run ends.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.checkpoint import checkpoint

from ddp_kit.buffers import Buffer, RunningStatistics, buffers_put_back
from ddp_kit.collectives import first_difference
from ddp_kit.control import Control
from ddp_kit.counts import Count, FixedCount, FoundCount, KnownCount
from ddp_kit.data.loader import Feed
from ddp_kit.data.reader import MicroBatch
from ddp_kit.errors import ConfigError, DdpKitError, nearest
from ddp_kit.exactness import require_fit
from ddp_kit.finite import samples_named
from ddp_kit.groups import Group
from ddp_kit.metrics import LossSum
from ddp_kit.precision import LossScale
from ddp_kit.seeding import forward_key, generators_put_back, seed_forward
from ddp_kit.settings import Precision
from ddp_kit.strategies import choose_strategy
from ddp_kit.training import LossCall, ObjectiveState, Training
from ddp_kit.weights import require_equal


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
    exact: bool = False,
) -> Training:
    """Wraps a model, its optimizer and its loss for a loop of one's own. Every rank calls it; see `wrap_parts`."""
    part = Part(loss=loss, optimizer=optimizer, scheduler=scheduler)
    return wrap_parts(model, [part], group=group, feed=feed, precision=precision, grad_clip=grad_clip, exact=exact)


def wrap_parts(
    model: nn.Module,
    parts: Sequence[Part],
    *,
    group: Group,
    feed: Feed,
    precision: Precision = "fp32",
    grad_clip: float = 0.0,
    find_unused_parameters: bool = False,
    has_checkpointed_activations: bool = False,
    exact: bool = False,
) -> Training:
    """Makes a model that lies on its device ready to train. Every rank calls it.

    Args: `model` on the group's device, with equal weights on all ranks; `parts` one or more objectives; `feed` this rank's
        batches, of which one is used for rehearsal; `exact` as in `exactness`, with as many CPU threads at any number of ranks.
    Raises: ConfigError or DdpKitError on every rank, naming the parameter or layer, before the first step.
    """
    require_equal(model, group=group)
    micro_batches = feed.plan.micro_batches
    if exact:
        require_fit(feed, group)
    statistics = RunningStatistics(model, group, micro_batches=micro_batches, always=has_checkpointed_activations, exact=exact)
    strategy = choose_strategy(group, find_unused_parameters=find_unused_parameters, exact=exact)
    training = Training(
        group=group,
        control=Control(group),
        strategy=strategy,
        model=model,
        objectives=[],
        statistics=statistics,
        plan=feed.plan,
        forward_key=forward_key(feed.seed),
        grad_clip=grad_clip,
    )
    batch = feed.rehearsal()
    for part in parts:
        name = f"{part.trains}/" if len(parts) > 1 else ""
        _check_scheduler(part)
        parameters = _trained(model, part, is_only=len(parts) == 1)
        own = {id(parameter) for parameter in parameters}
        frozen = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in own]
        call = LossCall(model, part.loss, precision=precision, device=group.device)
        with _only(parameters, frozen), generators_put_back(), buffers_put_back(model) as buffers:
            count = _rehearse_bare(training, call, batch, parameters, feed=feed, allows_unused=find_unused_parameters)
            _note_buffers(training, buffers, exact=exact)
            wrapped = strategy.wrap(call)
            if group.world_size > 1:
                _rehearse_wrapped(training, wrapped, batch, parameters)
        training.objectives.append(
            ObjectiveState(
                name=name,
                call=wrapped,
                parameters=parameters,
                frozen=frozen,
                optimizer=part.optimizer,
                scheduler=part.scheduler,
                count=count,
                scale=LossScale.of(precision),
                found_inf=torch.zeros((), device=group.device),
                one=torch.ones((), device=group.device),
                is_deferred=_is_deferred(part.optimizer, group=group, precision=precision, objectives=len(parts)),
            )
        )
    return training


def _check_scheduler(part: Part) -> None:
    """Raises: ConfigError for a scheduler that would not move this optimizer's rates once per step."""
    if isinstance(part.scheduler, ReduceLROnPlateau):
        raise ConfigError("ReduceLROnPlateau counts evaluations, schedulers here count optimizer steps: take one of ddp_kit.schedules.")
    if part.scheduler is not None and getattr(part.scheduler, "optimizer", part.optimizer) is not part.optimizer:
        raise ConfigError("the scheduler belongs to another optimizer than the one it was given: build it from the function's argument.")


def _is_deferred(optimizer: Optimizer, *, group: Group, precision: Precision, objectives: int) -> bool:
    """Whether the optimizer can decide on the device, so that the host need not wait for each step's verdict."""
    on_device = group.device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False)
    return on_device and precision != "fp16" and objectives == 1


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
    named = {id(p): f"{part.trains}.{name}".lstrip(".") for name, p in module.named_parameters() if p.requires_grad}
    held = {id(p) for parameters in part.optimizer.param_groups for p in parameters["params"]}
    everything = {id(p) for p in model.parameters()}
    kind = type(part.optimizer).__name__
    if not held & set(named):
        what = "parameters that are not this model's" if held else "no parameters"
        raise ConfigError(f"the optimizer ({kind}) holds {what}. Build it from the model it is given: {kind}(model.parameters(), ...).")
    if held - everything:
        raise ConfigError(f"the optimizer ({kind}) holds {len(held - everything)} tensors that are not parameters of the model.")
    missing = [name for identity, name in named.items() if identity not in held]
    if missing:
        raise ConfigError(
            f"the optimizer ({kind}) does not hold {_names(missing)}, which the model would train. Give it all of them, or freeze "
            "these with requires_grad_(False)."
        )
    if held & everything - set(named) and not is_only:
        raise ConfigError(f"Objective(trains={part.trains!r}): its optimizer ({kind}) also holds parameters outside that part.")
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@contextmanager
def _only(parameters: Sequence[nn.Parameter], frozen: Sequence[nn.Parameter]) -> Iterator[None]:
    """Lets gradients reach `parameters` alone, and drops them at the end."""
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.grad = None
        for parameter in frozen:
            parameter.requires_grad_(True)


def _rehearse_bare(
    training: Training, call: LossCall, batch: MicroBatch, parameters: Sequence[nn.Parameter], *, feed: Feed, allows_unused: bool
) -> Count:
    """Runs the loss forward and backward once, unwrapped. Returns how its count will be known; names what gets no gradient."""
    group = training.group
    seed_forward(training.forward_key, 0, 0, device=group.device)
    with samples_named(batch, "before the first step"):
        total, count, _ = call(batch.batch)
    beforehand = feed.data.count(batch.batch) if feed.data.count is not None else count
    if not math.isclose(float(beforehand), float(count), rel_tol=1e-5):
        raise ConfigError(f"Data(count=...) gives {float(beforehand):g} where the loss counts {float(count):g}; they must agree.")
    known = _count_of(count, batch.size, feed=feed, group=group)
    if not total.requires_grad:
        raise ConfigError("the loss has no gradient: total must be computed from the model's output, without detach() or no_grad().")
    (total / batch.size).backward()
    _refuse_unused(training, parameters, allows_unused=allows_unused)
    if any(parameter.grad is not None and parameter.grad.is_sparse for parameter in parameters):
        raise ConfigError("the model has sparse gradients (an Embedding with sparse=True), which cannot be summed here: leave sparse out.")
    return known


def _rehearse_wrapped(training: Training, wrapped: nn.Module, batch: MicroBatch, parameters: Sequence[nn.Parameter]) -> None:
    """Runs until DDP's buckets are final: they are rebuilt after the first backward pass, and a later life of the run, which
    rebuilds them again, would otherwise sum in another order than the one it continues.
    """
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = None
        with training.strategy.micro_batch(wrapped, is_last=True):
            total, _, _ = wrapped(batch.batch)
            (total / batch.size).backward()


def _count_of(count: int | torch.Tensor, size: int, *, feed: Feed, group: Group) -> Count:
    """Returns how the loss's count will be known, from what it was for the `size` samples of the rehearsal."""
    is_fixed = not isinstance(count, torch.Tensor)
    if is_fixed and (count <= 0 or count % size) and feed.data.count is None:
        raise ConfigError(
            f"the loss's count is the int {count} for {size} samples. Return it as a tensor where it is not the same for each sample."
        )
    whole = float(count) / size * feed.plan.global_batch  # host-device synchronisation, once
    exponent = round(math.log2(whole)) if 0 < whole < math.inf else 0
    if first_difference(group, [int(is_fixed), int(count) if is_fixed else 0, exponent]) is not None:
        raise DdpKitError("the ranks' losses return different counts for the same samples; the loss must not depend on the rank.")
    if feed.data.count is not None:
        return KnownCount(feed.data.count, group=group, slots=feed.plan.micro_batches)
    if is_fixed:
        return FixedCount(per_sample=int(count) // size, global_batch=feed.plan.global_batch)
    return FoundCount(expected=2.0**exponent, group=group, slots=feed.plan.micro_batches)


def _refuse_unused(training: Training, parameters: Sequence[nn.Parameter], *, allows_unused: bool) -> None:
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    unused = [names[id(parameter)] for parameter in parameters if parameter.grad is None]
    if first_difference(training.group, [len(unused)]) is not None:
        raise DdpKitError(
            f"rank {training.group.rank} finds {len(unused)} parameters without a gradient for the same samples, others another number."
        )
    if unused and training.group.world_size > 1 and not allows_unused:
        raise ConfigError(
            f"{_names(unused)} got no gradient, and the other ranks would wait for it. If the loss leaves parameters out in some "
            "steps, type --find-unused-parameters; if it never uses them, freeze them with requires_grad_(False) or remove them."
        )


def _note_buffers(training: Training, before: Sequence[tuple[Buffer, torch.Tensor]], *, exact: bool) -> None:
    """Notes the buffers outside normalisation layers that a forward pass changed; they are taken from rank 0 at every step.

    Raises: ConfigError where that would have to be exact.
    """
    statistics = training.statistics
    known = {id(buffer.tensor) for buffer in statistics.others}
    for buffer, value in before:
        is_ours = buffer.tensor.untyped_storage().data_ptr() in statistics.owned or id(buffer.tensor) in known
        if not is_ours and not torch.equal(buffer.settle(), value):
            if exact:
                raise ConfigError(
                    f"--exact: training changes the buffer {buffer.name}, which only normalisation layers may: rank 0's depends on the "
                    "number of ranks. Leave out --exact, or make it no buffer of training."
                )
            statistics.others.append(buffer)
            if training.group.world_size > 1:
                training.notes.append(f"buffer {buffer.name} is changed by training; it is taken from rank 0")


def _names(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"


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
