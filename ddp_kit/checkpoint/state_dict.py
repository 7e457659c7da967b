"""All that a run must remember, as named tensors and plain values; and putting it back.

A later attempt that gets all of it back goes on bit for bit. Randomness is no part of it: a counter
and the seed give every draw again.

Names: `model/NAME`, `ema/NAME`, `optimizer/OBJECTIVE NAME/KEY`, with the bare model's parameter
names; `extra/MODULE`, and what an optimizer keeps beside: `optimizer/OBJECTIVE rest`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ddp_kit.checkpoint.extra_state import extra_states, restore_extra
from ddp_kit.checkpoint.format.encoding import decode, encode, references
from ddp_kit.checkpoint.format.fit import require_fit
from ddp_kit.checkpoint.format.layout import NAMES
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.checkpoint.forward_values import (
    forward_values,
    own_items,
    restore_forward,
    take_passing,
)
from ddp_kit.checkpoint.items import by_who_has_them, kind_of_item
from ddp_kit.checkpoint.optimizer_state import (
    advance_schedule,
    allocate,
    objective_values,
    restore_objective,
)
from ddp_kit.checkpoint.same_state import (
    match_average,
    require_equal_on_ranks,
    require_same_run,
)
from ddp_kit.checkpoint.weights import tied_names
from ddp_kit.distributed.collectives import gather_bytes
from ddp_kit.distributed.local_shard import Held, Item, held, is_split
from ddp_kit.stopping.early_stopping import EarlyStopping
from ddp_kit.training.state import Training


@dataclass(frozen=True)
class State:
    """Live tensors by name, those that all ranks have and this rank's `own` parts of others, and
    values that JSON can hold.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    own: dict[str, Held] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """The tensors that must be copied before the next forward pass."""
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if not isinstance(tensor, nn.Parameter)
        }


def model_tensors(model: nn.Module, *, trainable_only: bool = False) -> dict[str, torch.Tensor]:
    """Returns parameters and all buffers as `model/NAME`, a tied one once; `trainable_only` leaves
    frozen parameters out.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trainable_only:
            tensors[f"model/{name}"] = parameter
    for name, buffer in model.named_buffers():
        tensors[f"model/{name}"] = buffer
    return tensors


def _model_items(training: Training) -> dict[str, Item]:
    """Returns the model's tensors and their averages, which may be in parts."""
    items: dict[str, Item] = dict(
        model_tensors(training.model, trainable_only=bool(training.base_sha256))
    )
    items |= own_items(training)
    average = training.average
    if average is None:
        return items
    for name, like, own in zip(average.names, average.like, average.averages, strict=True):
        if f"model/{name}" not in items:
            continue
        if is_split(like):
            items[f"ema/{name}"] = held(like, own)
        else:
            items[f"ema/{name}"] = own
    return items


def state_of(
    training: Training,
    *,
    early_stopping: EarlyStopping | None = None,
    more: Mapping[str, Any] | None = None,
) -> State:
    """Returns the state of a run at a step boundary; `more` are values of the caller's own. Every
    rank calls it.

    Raises: ConfigError if an optimizer's or scheduler's state is not tensors and plain data.
    """
    items = _model_items(training)
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    objectives = [objective_values(objective, names, items) for objective in training.objectives]
    extra: dict[str, torch.Tensor] = {}
    extra_values = extra_states(training.model, extra)
    items |= extra
    require_equal_on_ranks(training, objectives, extra_values, items)
    values: dict[str, Any] = {
        "step": training.step,
        "skipped": training.skipped,
        "objectives": objectives,
        "extra": extra_values,
        "base_sha256": training.base_sha256,
        "tied": tied_names(training.model),
    }
    values |= forward_values(training)
    bad_steps = training.bad_steps.to_save()
    if bad_steps:
        values["bad_steps"] = bad_steps
    if early_stopping is not None:
        own = {
            "best": early_stopping.best,
            "best_step": early_stopping.best_step,
            "stale": early_stopping.stale,
        }
        values["early_stopping"] = encode(own, {}, name="early_stopping")
    values |= more or {}
    kinds: dict[str, Any] = {}
    for name, item in items.items():
        shape, dtype = kind_of_item(name, item)
        kinds[name] = [list(shape), NAMES[dtype]]
    if not all(objective.optimizer_view.has_all for objective in training.objectives):
        _share_what_each_rank_knows(training, objectives, kinds)
    values["tensors"] = kinds
    tensors, own_rows = by_who_has_them(items, training.group)
    return State(tensors, own_rows, values)


def _share_what_each_rank_knows(
    training: Training, objectives: list[dict[str, Any]], kinds: dict[str, Any]
) -> None:
    """Completes what each rank knows of its own parameters' optimizer state by what the others know
    of theirs.
    """
    own = [[entry["state"] for entry in objectives], kinds]
    for row in gather_bytes(training.group, json.dumps(own).encode()):
        states, known = json.loads(row)
        kinds |= known
        for entry, state in zip(objectives, states, strict=True):
            entry["state"] |= state


def restore_state(
    opened: Opened,
    training: Training,
    *,
    early_stopping: EarlyStopping | None = None,
    keeps_hyperparameters: bool = True,
    schedule_at: int | None = None,
) -> None:
    """Puts a checkpoint's state into a run that was built alike. Every rank calls it.

    Args: `keeps_hyperparameters` False: the optimizer's numbers (momentum, weight decay, ...) are
        this attempt's, which has not stepped yet, and so is its schedule: of the file's it takes
        the position alone, or that of `schedule_at` steps.
    Raises: ConfigError with a table if the tensors do not fit, or a schedule does not go as far,
        with nothing restored.
    """
    values = opened.values
    saved = {entry["name"]: entry for entry in values["objectives"]}
    require_same_run(opened, training, saved, keeps_hyperparameters=keeps_hyperparameters)
    names = dict(training.model.named_parameters())
    targets = _model_items(training)
    found = dict(opened.kinds)
    begins_average = False
    if not keeps_hyperparameters:
        begins_average = match_average(found, targets, training.average)
    tensors: dict[str, torch.Tensor] = {}
    for objective in training.objectives:
        tensors |= allocate(opened, objective, saved[objective.name], names, targets)
    of_no_parameter = _empty_like_saved(opened)
    targets |= of_no_parameter
    tensors |= of_no_parameter
    reshaped = take_passing(opened, training, targets)
    for name in reshaped.left_out:
        found.pop(name, None)
    wanted = {name: kind_of_item(name, item) for name, item in targets.items()}
    require_fit(found, wanted, where=opened.folder)
    if not keeps_hyperparameters:
        for objective in training.objectives:
            advance_schedule(
                objective,
                steps=values["step"] if schedule_at is None else schedule_at,
                where=opened.folder,
            )
    # From here on the run changes.
    opened.copy_into(_kept_here(targets))
    for objective in training.objectives:
        restore_objective(
            objective,
            saved[objective.name],
            names,
            tensors,
            keeps_hyperparameters=keeps_hyperparameters,
        )
    reshaped.put(training.model)
    restore_extra(values.get("extra", {}), training.model, tensors)
    restore_forward(opened, training, targets)
    if begins_average and training.average is not None:
        training.average.restart()
    _restore_counters(values, training, early_stopping, tensors)


def _restore_counters(
    values: Mapping[str, Any],
    training: Training,
    early_stopping: EarlyStopping | None,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    training.step = values["step"]
    training.skipped = values["skipped"]
    training.bad_steps.restore(values.get("bad_steps", {}))
    if early_stopping is not None and "early_stopping" in values:
        for key, value in decode(values["early_stopping"], tensors).items():
            setattr(early_stopping, key, value)


def _kept_here(items: Mapping[str, Item]) -> dict[str, Item]:
    """Returns items without those that other ranks keep, which are on the meta device here."""
    kept = {}
    for name, item in items.items():
        is_elsewhere = isinstance(item, torch.Tensor) and item.is_meta
        if not is_elsewhere:
            kept[name] = item
    return kept


def _empty_like_saved(opened: Opened) -> dict[str, torch.Tensor]:
    """Returns memory for the tensors in parameter groups, schedules and what else optimizers and
    modules keep, which are values of no parameter: they are on the CPU, as the file has them.
    """
    kept: list[Any] = [opened.values.get("extra")]
    for entry in opened.values["objectives"]:
        kept += [entry["groups"], entry["scheduler"], entry.get("rest")]
    tensors = {}
    for name in references(kept):
        shape, dtype = opened.kinds[name]
        tensors[name] = torch.empty(shape, dtype=dtype)
    return tensors
