"""The memory format of a model: channels_last where it is faster and changes nothing.

Two-dimensional convolutions run faster in it. The same values lie in another order then, which a
model may read: view() and as_strided() do. So both formats are tried before the first step, and
where one is in doubt, weights and batches stay as they are made.
"""

import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from ddp_kit.data.dataset import Data
from ddp_kit.data.transfer import Placement
from ddp_kit.distributed.collectives import gather_bytes
from ddp_kit.distributed.process_group import Group
from ddp_kit.io.logs import logger
from ddp_kit.model_state.untouched import untouched
from ddp_kit.recipe import Recipe
from ddp_kit.settings import Settings
from ddp_kit.setup.format_trial import (
    Figures,
    Trial,
    difference,
    evaluation_trial,
    optimizer_trial,
    training_trial,
)
from ddp_kit.strategies.precision import weight_dtype

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
# Of a trial that failed in both formats: the dry run will say why, in better words.
UNTOLD = "?"
# By which errors of torch, and asserts of others, are known that ask for a memory format.
OF_MEMORY = re.compile(
    r"contiguous|strid|view size|\.view\(|memory.?format|channels_last|divisible by|storage"
)


def has_channels_last(model: nn.Module, settings: Settings) -> bool:
    """Whether that format is tried for a model. Neither FSDP2 nor ZeRO can split it."""
    can_have_it = settings.tuning and settings.strategy not in ("fsdp", "deepspeed")
    return can_have_it and any(isinstance(module, nn.Conv2d) for module in model.modules())


def placement_of(model: nn.Module, settings: Settings, group: Group) -> Placement:
    """Returns where the batches of a model have to be, in the format that is tried for it."""
    return Placement(
        group.device,
        dtype=weight_dtype(settings.precision),
        channels_last=has_channels_last(model, settings),
    )


def chosen_placement(
    model: nn.Module,
    recipe: Recipe,
    data: Data,
    sets: Mapping[str, Data],
    settings: Settings,
    group: Group,
) -> Placement:
    """Returns where a run's batches have to be, as `choose_memory_format` does."""
    wanted = placement_of(model, settings, group)
    trials = []
    if wanted.channels_last:
        trials.append(training_trial(model, recipe, data, settings, group))
        trials.append(evaluation_trial(model, recipe, sets, settings, group))
    return choose_memory_format(model, wanted, trials, group=group)


def placement_for_optimizers(
    model: nn.Module,
    placement: Placement,
    optimizers: Sequence[Optimizer],
    settings: Settings,
    group: Group,
) -> Placement:
    """Returns the placement to use with optimizers, once they are built. Every rank calls it.

    One that reads memory itself, as those do that view a convolution's weight as a matrix, is tried
    as the model is. torch's own do not.
    """
    foreign = [each for each in optimizers if not type(each).__module__.startswith("torch.optim.")]
    if not placement.channels_last or not foreign:
        return placement
    for weight in _weights_of_convolutions(model):
        weight.data = weight.data.to(memory_format=torch.contiguous_format)
    trials = [optimizer_trial(model, optimizer, settings, group) for optimizer in foreign]
    return choose_memory_format(model, placement, trials, group=group)


def choose_memory_format(
    model: nn.Module, wanted: Placement, trials: Sequence[Trial], *, group: Group
) -> Placement:
    """Returns the placement to use, and gives the model the memory format that goes with it.

    Every rank calls it, and all take the same one: channels_last if each of the trials computes the
    same in it on each of the ranks. Trials leave no trace.
    """
    if not wanted.channels_last:
        return wanted
    plain = Placement(wanted.device, dtype=wanted.dtype)
    reason = _reason_against(model, wanted, plain, trials)
    reasons = [said.decode(errors="ignore") for said in gather_bytes(group, reason.encode()[:500])]
    reasons = [said for said in reasons if said]
    if not reasons:
        _lay_convolutions(model)
        return wanted
    if reasons[0] != UNTOLD:
        logger.info("note: channels_last is off, since %s", reasons[0])
    return plain


def _reason_against(
    model: nn.Module, wanted: Placement, plain: Placement, trials: Sequence[Trial]
) -> str:
    """Tries both formats on this rank. Returns why the model cannot have the wanted one, or ""."""
    try:
        as_made = [_tried(model, trial, plain) for trial in trials]
    except Exception:
        return UNTOLD
    before = _lay_convolutions(model)
    try:
        laid = [_tried(model, trial, wanted) for trial in trials]
    except Exception as error:
        return _in_words(error)
    finally:
        for parameter, memory in before:
            parameter.data = memory
    for one, other in zip(as_made, laid, strict=True):
        if found := difference(one, other):
            return found
    return ""


def _tried(model: nn.Module, trial: Trial, placement: Placement) -> Figures:
    with untouched(model):
        try:
            return trial(placement)
        finally:
            model.zero_grad(set_to_none=True)


def _weights_of_convolutions(model: nn.Module) -> list[nn.Parameter]:
    """Returns the weights of two-dimensional convolutions, and no others."""
    found = []
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, CONVOLUTIONS) and weight is not None and weight.dim() == 4:
            found.append(weight)
    return found


def _lay_convolutions(model: nn.Module) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Gives convolutions that format. Returns their weights with the memory that they had."""
    before = []
    for weight in _weights_of_convolutions(model):
        before.append((weight, weight.data))
        # contiguous() would leave the strides of a weight of one input channel, of which torch says
        # that they are of either format: their gradients come in those of this one.
        weight.data = weight.data.to(memory_format=torch.channels_last)
    return before


def _in_words(error: Exception) -> str:
    if "view size is not compatible" in str(error):
        return (
            "the model, or its optimizer, reshapes with view(); flatten(1) or reshape() would "
            "allow it"
        )
    lines = str(error).splitlines() or [""]
    return f"the model fails in it ({type(error).__name__}: {lines[0]})"


@contextmanager
def naming_the_format(placement: Placement) -> Iterator[None]:
    """Around what runs a model: an error that its memory format can have caused is told the flag
    that leaves the format as it is."""
    try:
        yield
    except Exception as error:
        if placement.channels_last and _is_of_memory(error):
            error.add_note(
                "the model and its batches are in channels_last, for speed, and this branch was "
                "not in the trial of it: where they must lie in memory as they are made, type "
                "--no-tuning"
            )
        raise


def _is_of_memory(error: Exception) -> bool:
    """Whether the words of an error, or the line that raised it, ask for a memory format."""
    frames = traceback.extract_tb(error.__traceback__)
    line = frames[-1].line if frames else ""
    return bool(OF_MEMORY.search(f"{error} {line}"))
