"""What a model's losses and evaluation compute, to be compared between two memory formats.

Rounding differs between formats, and by the square root of a BatchNorm's 1 / eps more behind it: a
few parts in 100,000. A model that reads memory in the order in which it lies computes something
else, which is parts in ten. The limits lie between, and a doubt costs speed only.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ddp_kit.data.batch_plan import plan_batches
from ddp_kit.data.dataset import Data
from ddp_kit.data.loader import feed_of, first_of_evaluation
from ddp_kit.data.seeding import forward_key, seed_forward
from ddp_kit.data.transfer import Placement, map_tensors
from ddp_kit.distributed.process_group import Group
from ddp_kit.recipe import Recipe
from ddp_kit.settings import Precision, Settings
from ddp_kit.strategies.precision import arithmetic
from ddp_kit.training.answers import Answer
from ddp_kit.training.evaluation import evaluating, measure_of
from ddp_kit.training.state import LossCall

SAMPLES = 2  # as many as BatchNorm needs
MOST_OF_NUMBERS = 1e-3
MOST_OF_TENSORS = 1e-2
# Of the largest among the tensors: what is nothing but rounding has no digits.
LEAST_OF_TENSORS = 1e-4

Figures = tuple[list[float], list[torch.Tensor]]
# From where a batch is to be, what is computed of it.
Trial = Callable[[Placement], Figures]


def training_trial(
    model: nn.Module, recipe: Recipe, data: Data, settings: Settings, group: Group
) -> Trial:
    """Returns what runs the losses forward and backward on two samples, which are read once."""
    plan = plan_batches(min(SAMPLES, settings.global_batch), micro_batch=0, world_size=1)
    feed = feed_of(
        data,
        plan=plan,
        rank=0,
        seed=settings.seed,
        placement=Placement(torch.device("cpu")),
        num_workers=settings.num_workers,
    )
    batch = feed.dry_run_batch().batch
    precision = _unrounded(settings.precision)

    def run(placement: Placement) -> Figures:
        numbers: list[float] = []
        gradients: list[torch.Tensor] = []
        for i, part in enumerate(recipe.parts()):
            call = LossCall(model, part.loss, precision=precision, device=group.device)
            with _alike(settings, group, objective=i):
                total, count, metrics = call(placement(map_tensors(batch, torch.clone)))
                numbers += _numbers({"": (total.detach(), count), **metrics})
                if total.requires_grad:
                    total.backward()
            gradients += _taken_gradients(model)
        return numbers, gradients

    return run


def evaluation_trial(
    model: nn.Module,
    recipe: Recipe,
    sets: Mapping[str, Data],
    settings: Settings,
    group: Group,
) -> Trial:
    """Returns what evaluates two samples of each set, which are read once."""
    batches = []
    for data in sets.values():
        first = first_of_evaluation(data, micro_batch=SAMPLES, num_workers=settings.num_workers)
        if first is not None:
            batches.append(first)

    def run(placement: Placement) -> Figures:
        numbers: list[float] = []
        rows: list[torch.Tensor] = []
        for first in batches:
            with evaluating(model), _alike(settings, group):
                batch = placement(map_tensors(first.batch, torch.clone))
                answer = Answer(measure_of(recipe)(model, batch), size=first.size)
            numbers += _numbers(answer.sums)
            rows += [row for row in answer.rows.values() if row.is_floating_point()]
        return numbers, [row.detach().double().cpu() for row in rows]

    return run


def optimizer_trial(
    model: nn.Module, optimizer: Optimizer, settings: Settings, group: Group
) -> Trial:
    """Returns what steps a copy of an optimizer by gradients that are drawn."""
    own = {id(parameter): parameter for parameter in model.parameters()}

    def run(placement: Placement) -> Figures:
        copied = copy.deepcopy(optimizer, dict(own))
        generator = torch.Generator().manual_seed(settings.seed)
        before = []
        for parameter in own.values():
            before.append(parameter.detach().clone())
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(drawn)
        with _alike(settings, group), torch.no_grad():
            copied.step()
        changes = []
        for parameter, value in zip(own.values(), before, strict=True):
            changes.append((parameter.detach() - value).to("cpu", torch.float64))
        return [], changes

    return run


def difference(one: Figures, other: Figures) -> str:
    """Returns in which way two figures of the same differ by more than rounding; "" if they do
    not."""
    numbers, tensors = one
    other_numbers, other_tensors = other
    if not all(math.isfinite(number) for number in numbers):
        return "two samples give numbers that are not finite, which cannot be compared"
    for number, another in zip(numbers, other_numbers, strict=True):
        if not math.isclose(number, another, rel_tol=MOST_OF_NUMBERS, abs_tol=1e-6):
            return f"the model computes something else in it ({another:.6g} for {number:.6g})"
    largest = max([float(tensor.norm()) for tensor in tensors], default=0.0)
    for tensor, another_tensor in zip(tensors, other_tensors, strict=True):
        most = MOST_OF_TENSORS * float(tensor.norm()) + LEAST_OF_TENSORS * largest
        # So that nan is a difference.
        if not float((tensor - another_tensor).norm()) <= most:
            return "the model's gradients, or its optimizer's steps, are others in it"
    return ""


class _DrawsAlike(TorchDispatchMode):
    """Draws random numbers in the order of dimensions, whatever the order in memory.

    torch fills memory as it lies: dropout of a tensor in channels_last drops other units. Which
    units are dropped is no difference between programs.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        given: dict[int, torch.Tensor] = {}

        def plain(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_contiguous():
                return tensor
            laid_plainly = tensor.contiguous()
            given[id(laid_plainly)] = tensor
            return laid_plainly

        def laid(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in given:
                return given[id(tensor)].copy_(tensor)
            for other in given.values():
                if other.shape == tensor.shape:
                    return torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)
            return tensor

        plain_args = tree_map_only(torch.Tensor, plain, args)
        # What is drawn in place, and what is returned of it, is what was given.
        return tree_map_only(torch.Tensor, laid, func(*plain_args, **kwargs))


@contextmanager
def _alike(settings: Settings, group: Group, *, objective: int = 0) -> Iterator[None]:
    """Around one pass: draws and arithmetic that are the same in another format, and no waiting for
    a compiler."""
    device = group.device
    seed_forward(forward_key(settings.seed, objective=objective), 0, 0, device=device)
    with (
        arithmetic(_unrounded(settings.precision), device),
        torch.compiler.set_stance("force_eager"),
        _DrawsAlike(),  # type: ignore[no-untyped-call]  # torch's, without annotations
    ):
        yield


def _unrounded(precision: Precision) -> Precision:
    """Returns the precision in which formats are compared: what is rounded to a few digits tells
    no difference."""
    return "fp64" if precision == "fp64" else "fp32"


def _numbers(sums: Mapping[str, Sequence[Any]]) -> list[float]:
    found = []
    for name in sorted(sums):
        for number in sums[name]:
            if isinstance(number, torch.Tensor):
                found.append(number.detach().item())
            else:
                found.append(float(number))
    return found


def _taken_gradients(model: nn.Module) -> list[torch.Tensor]:
    """Returns the model's gradients and drops them."""
    found = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            found.append(parameter.grad.detach().to("cpu", torch.float64))
            parameter.grad = None
    return found
