"""All that a run must remember, as named tensors and plain values; and putting it back.

Owns: which items of state there are, under which names. A later life that gets all of them back goes on bit for bit.
Refuses: files, and randomness (a counter and the seed give every draw again).

Names: `model/NAME`, `ema/NAME`, `optimizer/OBJECTIVE NAME/KEY`, with the bare model's parameter names.
"""

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ddp_kit.checkpoint.format.encoding import decode, encode, references
from ddp_kit.checkpoint.format.layout import NAMES
from ddp_kit.checkpoint.format.reader import Item, Opened, require_fit
from ddp_kit.checkpoint.format.sharding import Piece, Shape, cut
from ddp_kit.checkpoint.weights import tied_names
from ddp_kit.distributed.collectives import gather_bytes
from ddp_kit.distributed.local_shard import Fragment, Held, held, is_split
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.stopping.early_stopping import EarlyStopping
from ddp_kit.training.state import ObjectiveState, Training

KEEPS_OWN = {
    "params",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
}  # of a parameter group: how it is computed, not what


@dataclass(frozen=True)
class State:
    """Live tensors by name, those that all ranks have and this rank's `own` parts of others, and values that JSON can hold."""

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
    """Returns parameters and all buffers as `model/NAME`, a tied one once; `trainable_only` leaves frozen parameters out."""
    kept = [
        (name, tensor)
        for name, tensor in model.named_parameters()
        if tensor.requires_grad or not trainable_only
    ]
    return {f"model/{name}": tensor for name, tensor in [*kept, *model.named_buffers()]}


def _items_of(training: Training) -> dict[str, Item]:
    items: dict[str, Item] = dict(
        model_tensors(training.model, trainable_only=bool(training.base_sha256))
    )
    average = training.average
    if average is not None:
        found = zip(average.names, average.like, average.averages, strict=True)
        items |= {
            f"ema/{name}": held(like, own) if is_split(like) else own
            for name, like, own in found
            if f"model/{name}" in items
        }
    return items


def _kind(item: Item) -> tuple[tuple[int, ...], torch.dtype]:
    part = held(item) if isinstance(item, torch.Tensor) else item
    return tuple(part.shape), part.rows.dtype if isinstance(part, Held) else part.content.dtype


def state_of(
    training: Training,
    *,
    early_stopping: EarlyStopping | None = None,
    more: Mapping[str, Any] | None = None,
) -> State:
    """Returns the state of a run at a step boundary; `more` are values of the caller's own.

    Raises: ConfigError if an optimizer's or scheduler's state is not tensors and plain data.
    """
    items = _items_of(training)
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    objectives = [_objective_values(objective, names, items) for objective in training.objectives]
    values: dict[str, Any] = {
        "step": training.step,
        "skipped": training.skipped,
        "objectives": objectives,
    }
    values["base_sha256"] = training.base_sha256
    values["tied"] = tied_names(training.model)
    if early_stopping is not None:
        own = {
            "best": early_stopping.best,
            "best_step": early_stopping.best_step,
            "stale": early_stopping.stale,
        }
        values["early_stopping"] = encode(own, {}, name="early_stopping")
    values |= more or {}
    kinds = {
        name: [list(shape), NAMES[dtype]]
        for name, (shape, dtype) in ((name, _kind(item)) for name, item in items.items())
    }
    if any(objective.owns is not None for objective in training.objectives):
        _exchange(training, objectives, kinds)
    values["tensors"] = kinds
    plain = {
        name: item
        for name, item in items.items()
        if isinstance(item, torch.Tensor) and not is_split(item)
    }
    parts = {
        name: held(item) if isinstance(item, torch.Tensor) else item
        for name, item in items.items()
        if name not in plain
    }
    rows = {name: part for name, part in parts.items() if isinstance(part, Held)}
    rows |= _rows(
        {name: part for name, part in parts.items() if isinstance(part, Fragment)}, training.group
    )
    return State(plain, rows, values)


def _rows(fragments: Mapping[str, Fragment], group: Group) -> dict[str, Held]:
    """Puts tensors that are split anywhere together, one at a time, and keeps in host memory the rows that this rank is to write."""
    shapes = {
        name: Shape(part.shape, part.content.dtype.itemsize) for name, part in fragments.items()
    }
    pieces = {
        piece.name: piece for piece in cut(shapes, rank=group.rank, world_size=group.world_size)
    }
    found = {}
    for name, part in fragments.items():
        piece = pieces.get(name, Piece(name, 0, 0))
        found[name] = Held(
            part.gather()[piece.start : piece.stop].to("cpu", copy=True), piece.start, part.shape
        )
    return found


def _exchange(training: Training, objectives: list[dict[str, Any]], kinds: dict[str, Any]) -> None:
    """Completes what each rank knows of its own parameters' optimizer state by what the others know of theirs."""
    rows = gather_bytes(
        training.group, json.dumps([[entry["state"] for entry in objectives], kinds]).encode()
    )
    for states, known in map(json.loads, rows):
        kinds |= known
        for entry, state in zip(objectives, states, strict=True):
            entry["state"] |= state


def _objective_values(
    objective: ObjectiveState, names: Mapping[int, str], items: dict[str, Item]
) -> dict[str, Any]:
    prefix = f"optimizer/{objective.name}"
    groups, states = [], {}
    shared: dict[str, torch.Tensor] = {}
    for i, group in enumerate(objective.optimizer.param_groups):
        own = {key: value for key, value in group.items() if key not in KEEPS_OWN}
        groups.append(encode(own, shared, name=f"{prefix}group.{i}"))
    for parameter, kept in _moments(objective):
        name = names[id(parameter)]
        found: dict[str, torch.Tensor] = {}
        states[name] = {
            key: encode(value, found, name=f"{prefix}{name}/{key}") for key, value in kept.items()
        }
        if is_split(parameter) and objective.moments is None:
            _require_alike(parameter, found)
        if objective.moments is not None:
            items |= {at: objective.moments.part(parameter, tensor) for at, tensor in found.items()}
        else:
            items |= (
                found
                if objective.owns is None
                else {at: held(tensor) for at, tensor in found.items()}
            )
    schedule = objective.scheduler.state_dict() if objective.scheduler is not None else None
    encoded = encode(schedule, shared, name=f"scheduler/{objective.name}")
    items |= shared
    return {
        "name": objective.name,
        "groups": groups,
        "state": states,
        "scheduler": encoded,
        "scale": asdict(objective.scale),
    }


def _require_alike(parameter: nn.Parameter, found: Mapping[str, torch.Tensor]) -> None:
    """Raises: ConfigError for state that is neither one number nor split as its parameter is: no later life could split it."""
    for name, tensor in found.items():
        if tensor.dim() and not (is_split(tensor) and tensor.shape == parameter.shape):
            raise ConfigError(
                f"the optimizer's {name} has shape {tuple(tensor.shape)} on a rank and its parameter, of which ranks hold rows, "
                f"{tuple(parameter.shape)}: only what is shaped alike can be split alike. Type --strategy zero1, or another optimizer."
            )


def _moments(objective: ObjectiveState) -> Iterator[tuple[nn.Parameter, Mapping[str, Any]]]:
    """Yields the optimizer's state by parameter, where there is some."""
    if objective.moments is not None:
        yield from ((parameter, kept) for parameter, kept in objective.moments.items() if kept)
        return
    for group in objective.optimizer.param_groups:
        yield from (
            (parameter, kept)
            for parameter in group["params"]
            if (kept := objective.optimizer.state.get(parameter))
        )


def restore_state(
    opened: Opened,
    training: Training,
    *,
    early_stopping: EarlyStopping | None = None,
    keeps_hyperparameters: bool = True,
) -> None:
    """Puts a checkpoint's state into a run that was composed alike. Every rank calls it.

    Args: `keeps_hyperparameters` False: the optimizer's numbers (momentum, weight decay, ...) are this life's, which has not stepped yet,
        and so is its schedule: of the file's it takes the position alone.
    Raises: ConfigError with a table if the tensors do not fit, or a schedule does not go as far, with nothing restored.
    """
    values = opened.values
    names = dict(training.model.named_parameters())
    saved = {entry["name"]: entry for entry in values["objectives"]}
    own = {
        objective.name: len(objective.optimizer.param_groups) for objective in training.objectives
    }
    if {name: len(entry["groups"]) for name, entry in saved.items()} != own:
        raise ConfigError(
            f"{opened.folder} has other objectives or parameter groups than this recipe."
        )
    if values["base_sha256"] != training.base_sha256:
        raise ConfigError(
            f"{opened.folder} was saved over frozen weights of SHA-256 {values['base_sha256'][:12] or '(all saved)'}; this life has "
            f"{training.base_sha256[:12] or 'no --save-trainable-only'}. Start from the same base: --init-from as the first life had it."
        )
    targets = _items_of(training)
    tensors: dict[str, torch.Tensor] = {}
    for objective in training.objectives:
        tensors |= _places(opened, objective, saved[objective.name], names, targets)
    loose = [
        part for entry in values["objectives"] for part in (entry["groups"], entry["scheduler"])
    ]
    values_of = {
        name: torch.empty(opened.kinds[name][0], dtype=opened.kinds[name][1])
        for name in references(loose)
    }
    targets |= values_of
    tensors |= values_of
    require_fit(
        opened.kinds, {name: _kind(item) for name, item in targets.items()}, where=opened.folder
    )
    if not keeps_hyperparameters:
        for objective in training.objectives:
            _advance(objective, steps=values["step"], where=opened.folder)
    opened.copy_into(
        {
            name: item
            for name, item in targets.items()
            if not isinstance(item, torch.Tensor) or not item.is_meta
        }
    )
    for objective in training.objectives:
        _restore_objective(
            objective,
            saved[objective.name],
            names,
            tensors,
            keeps_hyperparameters=keeps_hyperparameters,
        )
    training.step, training.skipped = values["step"], values["skipped"]
    if early_stopping is not None and "early_stopping" in values:
        for key, value in decode(values["early_stopping"], tensors).items():
            setattr(early_stopping, key, value)


def _places(
    opened: Opened,
    objective: ObjectiveState,
    saved: Mapping[str, Any],
    names: Mapping[str, nn.Parameter],
    targets: dict[str, Item],
) -> dict[str, torch.Tensor]:
    """Returns tensors for an optimizer's state: those that it has, else new ones where torch would have them: like the parameter, a
    scalar on the CPU; without memory for what other ranks keep. `targets` gets them as what is to be read into them.

    Raises: ConfigError for a state that is not shaped like its parameter, where that is split over the ranks.
    """
    tensors: dict[str, torch.Tensor] = {}
    live: dict[str, Item] = {}  # new memory takes longer to come by than its content
    _objective_values(objective, {id(parameter): name for name, parameter in names.items()}, live)
    for name, kept in saved["state"].items():
        like = names.get(name)
        for reference in references(kept):
            shape, dtype = opened.kinds[reference]
            has = live.get(reference)
            whole = held(like).shape if like is not None else ()
            if like is not None and objective.owns is not None and not objective.owns(like):
                tensors[reference] = torch.empty(shape, dtype=dtype, device="meta")
            elif like is not None and objective.moments is not None and shape == whole:
                tensors[reference] = objective.moments.empty(like, dtype=dtype)
                targets[reference] = objective.moments.part(like, tensors[reference])
                continue
            elif isinstance(has, torch.Tensor) and has.shape == shape and has.dtype == dtype:
                tensors[reference] = has
            elif (
                like is not None
                and (is_split(like) or objective.moments is not None)
                and shape
                and shape != whole
            ):
                raise ConfigError(
                    f"{opened.folder} cannot go on with this --strategy: the optimizer's {reference} has shape {shape}, its parameter "
                    f"{whole}, and only what is shaped alike can be split alike. Type --strategy ddp, or zero1."
                )
            elif like is not None and like.shape == shape:
                tensors[reference] = torch.empty_like(like, dtype=dtype, requires_grad=False)
            else:
                on_device = like is not None and (
                    bool(shape) or _steps_on_device(objective.optimizer)
                )
                tensors[reference] = torch.empty(
                    shape,
                    dtype=dtype,
                    device=like.device if like is not None and on_device else "cpu",
                )
            targets[reference] = tensors[reference]
    return tensors


def _steps_on_device(optimizer: Optimizer) -> bool:
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)


def _restore_objective(
    objective: ObjectiveState,
    saved: Mapping[str, Any],
    names: Mapping[str, nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
    *,
    keeps_hyperparameters: bool,
) -> None:
    optimizer = objective.optimizer
    optimizer.state.clear()
    for name, kept in saved["state"].items():
        if objective.owns is not None and not objective.owns(names[name]):
            continue
        if objective.moments is not None:
            objective.moments.restore(names[name], decode(kept, tensors))
        else:
            optimizer.state[names[name]] = decode(kept, tensors)
    if objective.refresh is not None:
        objective.refresh()
    for own, group in zip(optimizer.param_groups, saved["groups"], strict=True):
        kept = decode(group, tensors)
        own.update(kept if keeps_hyperparameters else _counted(optimizer, kept))
    if objective.scheduler is not None and keeps_hyperparameters:
        objective.scheduler.load_state_dict(decode(saved["scheduler"], tensors))
    if objective.scale.is_on and saved["scale"]["is_on"]:  # another precision begins with its own
        objective.scale.scale = saved["scale"]["scale"]
        objective.scale.good_steps = saved["scale"]["good_steps"]


def _advance(objective: ObjectiveState, *, steps: int, where: str) -> None:
    """Steps the schedule that this life has built to where a run of these settings would have it by now: many of torch's compute a rate
    from the one before. A million steps take 3 to 6 s.

    Raises: ConfigError for one that does not go as far.
    """
    if objective.scheduler is None:
        return
    objective.optimizer._opt_called = True  # type: ignore[attr-defined]  # those steps were taken, in the lives before
    try:
        for _ in range(steps):
            objective.scheduler.step()
    except Exception as error:  # whatever a schedule raises
        kind = type(objective.scheduler).__name__
        raise ConfigError(
            f"{where} is at step {steps}, and the schedule of the changed settings ({kind}) does not go as far: {error} "
            "Type more --epochs or --max-steps, or the settings as they were."
        ) from error


def _counted(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what an optimizer itself counts in a group, as schedule-free ones do: what it adds to the arguments it is built with."""
    arguments = {"lr"}
    for kind in type(optimizer).__mro__:
        if "__init__" in vars(kind):
            arguments |= set(inspect.signature(vars(kind)["__init__"]).parameters)
    return {
        key: value
        for key, value in group.items()
        if key in optimizer.defaults and key not in arguments
    }
