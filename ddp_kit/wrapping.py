"""From a model and its optimizers to `Training`: placing, checking, wrapping, rehearsing.

Owns: everything that happens to a model once, before the first step, and the faults that show there.
Refuses: repairing. A parameter that no optimizer trains, or that gets no gradient, is named and the run ends.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from ddp_kit.buffers import RunningStatistics
from ddp_kit.collectives import first_difference
from ddp_kit.control import Control
from ddp_kit.data.loader import Feed
from ddp_kit.data.reader import MicroBatch
from ddp_kit.errors import ConfigError, DdpKitError, nearest
from ddp_kit.groups import Group
from ddp_kit.metrics import LossSum
from ddp_kit.precision import LossScale
from ddp_kit.seeding import generators_put_back, seed_forward
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
) -> Training:
    """Wraps a model, its optimizer and its loss for a loop of one's own. Every rank calls it; see `wrap_parts`."""
    part = Part(loss=loss, optimizer=optimizer, scheduler=scheduler)
    return wrap_parts(model, [part], group=group, feed=feed, precision=precision, grad_clip=grad_clip)


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
) -> Training:
    """Makes a model that lies on its device ready to train. Every rank calls it.

    Args: `model` on the group's device, with equal weights on all ranks; `parts` one or more objectives; `feed` this rank's
        batches, of which one is used for rehearsal.
    Raises: ConfigError or DdpKitError on every rank, naming the parameter or layer, before the first step.
    """
    require_equal(model, group=group)
    micro_batches = feed.plan.micro_batches
    statistics = RunningStatistics(model, group, micro_batches=micro_batches, always=has_checkpointed_activations)
    strategy = choose_strategy(group, find_unused_parameters=find_unused_parameters)
    training = Training(
        group=group,
        control=Control(group),
        strategy=strategy,
        model=model,
        objectives=[],
        statistics=statistics,
        plan=feed.plan,
        seed=feed.seed,
        grad_clip=grad_clip,
        count=feed.data.count,
    )
    batch = feed.rehearsal()
    for part in parts:
        name = f"{part.trains}/" if len(parts) > 1 else ""
        parameters = _trained(model, part, is_only=len(parts) == 1)
        own = {id(parameter) for parameter in parameters}
        frozen = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in own]
        call = LossCall(model, part.loss, precision=precision, device=group.device)
        objective = ObjectiveState(
            name=name,
            call=call,
            parameters=parameters,
            frozen=frozen,
            optimizer=part.optimizer,
            scheduler=part.scheduler,
            scale=LossScale.of(precision),
            found_inf=torch.zeros((), device=group.device),
            is_deferred=_is_deferred(part.optimizer, group=group, precision=precision, objectives=len(parts)),
        )
        _rehearse(training, objective, batch, allows_unused=find_unused_parameters)
        training.objectives.append(objective)
    return training


def _is_deferred(optimizer: Optimizer, *, group: Group, precision: Precision, objectives: int) -> bool:
    """Whether the optimizer can decide on the device, so that the host need not wait for each step's verdict."""
    on_device = group.device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False)
    return on_device and precision != "fp16" and objectives == 1


def _trained(model: nn.Module, part: Part, *, is_only: bool) -> list[nn.Parameter]:
    """Returns the parameters of an objective. Raises: ConfigError if its optimizer holds none, foreign ones, or not all of them."""
    try:
        module = model.get_submodule(part.trains)
    except AttributeError:
        near = nearest(part.trains, [name for name, _ in model.named_modules()])
        raise ConfigError(
            f"Objective(trains={part.trains!r}): the model has no such part.{f' Did you mean {near!r}?' if near else ''}"
        ) from None
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


def _rehearse(training: Training, objective: ObjectiveState, batch: MicroBatch, *, allows_unused: bool) -> None:
    """Runs the loss forward and backward before the first step, and leaves no trace but what it learns.

    First bare, for what the loss's count is and which parameters and buffers are touched; then, wrapped, until DDP's buckets are
    final: they are rebuilt after the first backward pass, and a resumed life would otherwise sum in another order.
    """
    buffers = [(name, buffer, buffer.detach().clone()) for name, buffer in training.model.named_buffers()]
    for parameter in objective.frozen:
        parameter.requires_grad_(False)
    with generators_put_back():
        seed_forward(training.seed, 0, 0, device=training.group.device)
        total, count, _ = objective.call(batch.batch)
        _learn_count(training, objective, count, batch.size)
        if not total.requires_grad:
            raise ConfigError("the loss has no gradient: total must be computed from the model's output, without detach() or no_grad().")
        (total / max(objective.expected, 1)).backward()
        _refuse_unused(training, objective, allows_unused=allows_unused)
        _note_buffers(training, buffers)
        objective.call = training.strategy.wrap(objective.call)
        for _ in range(2 if training.group.world_size > 1 else 0):
            objective.optimizer.zero_grad(set_to_none=True)
            total, _, _ = objective.call(batch.batch)
            (total / max(objective.expected, 1)).backward()
    objective.optimizer.zero_grad(set_to_none=True)
    for parameter in objective.frozen:
        parameter.requires_grad_(True)
    with torch.no_grad():
        for _, buffer, before in buffers:
            buffer.copy_(before)


def _learn_count(training: Training, objective: ObjectiveState, count: int | torch.Tensor, size: int) -> None:
    is_fixed = not isinstance(count, torch.Tensor)
    if is_fixed and (count <= 0 or count % size):
        raise ConfigError(
            f"the loss's count is the int {count} for {size} samples. Return it as a tensor where it is not the same for each sample."
        )
    if first_difference(training.group, [int(is_fixed), int(count) if is_fixed else 0]) is not None:
        raise DdpKitError("the ranks' losses return different counts for the same samples; the loss must not depend on the rank.")
    objective.per_sample = int(count) // size if is_fixed else 0
    whole = float(count) / size * training.plan.global_batch  # host-device synchronisation, once
    objective.expected = 2.0 ** round(math.log2(whole)) if whole > 0 else 1.0


def _refuse_unused(training: Training, objective: ObjectiveState, *, allows_unused: bool) -> None:
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    unused = [names[id(parameter)] for parameter in objective.parameters if parameter.grad is None]
    if first_difference(training.group, [len(unused)]) is not None:
        raise DdpKitError(
            f"rank {training.group.rank} finds {len(unused)} parameters without a gradient for the same samples, others another number."
        )
    if unused and training.group.world_size > 1 and not allows_unused:
        raise ConfigError(
            f"{_names(unused)} got no gradient, and the other ranks would wait for it. If the loss leaves parameters out in some "
            "steps, type --find-unused-parameters; if it never uses them, freeze them with requires_grad_(False) or remove them."
        )


def _note_buffers(training: Training, before: list[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
    """Notes the buffers outside normalisation layers that a forward pass changed; they are taken from rank 0 at every step."""
    flat = training.statistics.owned
    changed = [
        (name, buffer) for name, buffer, old in before if not torch.equal(buffer, old) and buffer.untyped_storage().data_ptr() not in flat
    ]
    training.statistics.others += [buffer for _, buffer in changed if not any(buffer is other for other in training.statistics.others)]
    training.notes += [
        f"buffer {name} is changed by training; it is taken from rank 0" for name, _ in changed if training.group.world_size > 1
    ]


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
