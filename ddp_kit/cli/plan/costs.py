"""What a run would hold, send and write on many ranks, found out in one process without any memory for weights.

Owns: the model on the meta device, split by the real strategy over a fake process group, and the sums over what that gives.
Refuses: activations, which depend on the loss, and what libraries allocate for themselves: it says that they are left out.

Bytes that a rank sends in a collective over W ranks, of n bytes each: Source: Thakur et al., Optimization of Collective Communication
Operations in MPICH, 2005, sections 4 and 5: all-reduce 2 (W - 1) / W n, all-gather and reduce-scatter (W - 1) / W n, broadcast the same on
average. gloo makes its reduce-scatter of an all-reduce (seen on torch 2.15 by the kernel's count of bytes sent).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from ddp_kit.checkpoint.weights import tie, tied_names
from ddp_kit.data.batch_plan import BatchPlan
from ddp_kit.distributed.failures import Blame
from ddp_kit.distributed.local_shard import local
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.topology import Topology
from ddp_kit.errors import ConfigError
from ddp_kit.recipe import Recipe
from ddp_kit.settings import Settings
from ddp_kit.setup.wrap import part_of
from ddp_kit.strategies import choose_strategy
from ddp_kit.strategies.checks import require_elementwise, require_splittable
from ddp_kit.strategies.deepspeed.config import config_of
from ddp_kit.strategies.fsdp import gathered_dtype
from ddp_kit.strategies.fsdp_modules import modules_to_wrap
from ddp_kit.strategies.precision import placed, weight_dtype
from ddp_kit.strategies.zero1 import rebuilt
from ddp_kit.training.ema import is_weight

Backend = Literal["nccl", "gloo"]
Key = tuple[int, int]  # number of an objective, identity of a parameter
BUCKET, LIVE = (
    500_000_000,
    1_000_000_000,
)  # DeepSpeed's defaults: reduce_bucket_size, stage3_max_live_parameters, in elements


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the rank that holds most has, in bytes."""

    parameters: int  # their number, of the whole model
    weights: int
    gradients: int
    moments: int  # the optimizer's state
    average: int  # the EMA
    buffers: int
    gathered: int  # of weights that are split: what of them is whole for a moment, at most
    is_offloaded: bool = False  # weights, gradients, moments and average are in host memory
    sent: int  # in a step, by a rank on average
    checkpoint: int  # of all ranks together, without headers
    written: int  # of it by the rank that writes most

    @property
    def held(self) -> int:
        """All that a rank holds at once on its device, activations left out."""
        return (
            self.buffers + self.gathered
            if self.is_offloaded
            else self.weights
            + self.gradients
            + self.moments
            + self.average
            + self.buffers
            + self.gathered
        )


@contextmanager
def fake_group(*, ranks: int, ranks_per_node: int) -> Iterator[Group]:
    """Yields the group of rank 0 of `ranks`, whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    topology = Topology(
        world_size=ranks,
        local_world_size=min(ranks, ranks_per_node),
        nodes=-(-ranks // ranks_per_node),
    )
    group = Group(
        topology=topology, device=torch.device("cpu"), blame=Blame(rank=0, world_size=ranks)
    )
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        group.training = group.control = group.sums = dist.group.WORLD
        yield group
        group.closing.close()
    finally:
        group.training = group.control = group.sums = None
        dist.destroy_process_group()


def build(recipe: Recipe, settings: Settings) -> nn.Module:
    """Returns the recipe's model without memory; a model that needs values as it is built (a file's, or a rate of each layer) has some
    first.
    """
    try:
        with torch.device("meta"):
            model = recipe.model()
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        model = recipe.model()
    tied = tied_names(model)
    model = placed(model, device="meta", dtype=weight_dtype(settings.precision))
    tie(model, tied)
    return model


def costs_of(
    recipe: Recipe, settings: Settings, plan: BatchPlan, *, group: Group, backend: Backend
) -> Costs:
    """Returns what training would cost the group's ranks."""
    ranks, model = group.world_size, build(recipe, settings)
    strategy = settings.strategy if ranks > 1 else "ddp"
    require_splittable(model, settings, objectives=len(recipe.parts()))
    narrow = (
        gathered_dtype(model, settings.precision) or weight_dtype(settings.precision)
    ).itemsize
    pieces = _pieces(model, settings)
    if strategy == "fsdp":
        choose_strategy(group, settings).shard(model)
    states, shares = _states(recipe, model, settings, group)
    kept, whole = (sum(pair[i] for pair in states.values()) for i in (0, 1))
    parts = [part_of(model, objective.trains) for objective in recipe.parts()]
    trained = [
        parameter for part in parts for parameter in part.parameters() if parameter.requires_grad
    ]  # summed for each objective
    weights, gradients = _held(model.parameters()), _held(trained)
    buffers, floats = (
        _held(model.buffers()),
        _held(buffer for buffer in model.buffers() if is_weight(buffer)),
    )
    average = weights
    rounds = max(map(len, map(plan.of_rank, range(ranks))))
    everything = (
        _whole(model.parameters()) * (2 if settings.ema else 1)
        + buffers
        + (floats if settings.ema else 0)
        + whole
    )
    own = own_of_all = gathered = 0  # of what is saved, by this rank alone
    if strategy == "zero1":
        own, own_of_all = (
            (
                kept := max(
                    sum(states[key][0] for key in share if key in states) for share in shares
                )
            ),
            whole,
        )
    elif strategy == "fsdp":
        own, own_of_all = (
            weights * (2 if settings.ema else 1) + kept,
            everything - buffers - (floats if settings.ema else 0),
        )
        gathered = _gathered(pieces, narrow, settings, accumulates=rounds > 1)
    elif strategy == "deepspeed":
        stage, (bucket, live) = settings.deepspeed.stage, _limits(settings)
        gathered = (
            0,
            gradients,
            min(gradients, 2 * bucket),
            min(weights, live) + min(gradients, 2 * bucket),
        )[stage]
        weights, average = (weights, weights) if stage < 3 else (weights // ranks, weights // ranks)
        if stage:  # the optimizer steps a copy of its part
            weights, gradients, kept = (
                weights + gradients // ranks,
                gradients // ranks,
                kept // ranks,
            )
    return Costs(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights=weights,
        gradients=gradients,
        moments=kept,
        average=average + floats if settings.ema else 0,
        buffers=buffers,
        gathered=gathered,
        is_offloaded=strategy == "fsdp" and settings.fsdp.cpu_offload,
        sent=round(
            _sent(pieces, trained, narrow, settings, group=group, rounds=rounds, backend=backend)
        ),
        checkpoint=everything,
        written=(everything - own_of_all) // ranks + own,
    )


def _held(tensors: Iterable[torch.Tensor]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)


def _whole(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _pieces(model: nn.Module, settings: Settings) -> list[list[nn.Parameter]]:
    """Returns the parameters that FSDP gathers together, those of the root last."""
    taken: set[int] = set()
    found = []
    for module in [*modules_to_wrap(model, settings.fsdp), model]:
        found.append([parameter for parameter in module.parameters() if id(parameter) not in taken])
        taken |= {id(parameter) for parameter in found[-1]}
    return found


def _limits(settings: Settings) -> tuple[int, int]:
    """Returns the bytes of a bucket of gradients and those of gathered weights that DeepSpeed keeps."""
    zero = config_of(settings.deepspeed)["zero_optimization"]
    wide = weight_dtype(settings.precision).itemsize
    return int(zero.get("reduce_bucket_size", BUCKET)) * wide, int(
        zero.get("stage3_max_live_parameters", LIVE)
    ) * wide


def _states(
    recipe: Recipe, model: nn.Module, settings: Settings, group: Group
) -> tuple[dict[Key, tuple[int, int]], list[list[Key]]]:
    """Steps the optimizers once. Returns the bytes of each objective's state by parameter, here and over all ranks, and what of it zero1
    gives to each rank.

    Raises: ConfigError for an optimizer that the strategy cannot split, or that cannot be stepped without memory.
    """
    states: dict[Key, tuple[int, int]] = {}
    shares: list[list[Key]] = [[] for _ in range(group.world_size)]
    for number, objective in enumerate(recipe.parts()):
        optimizer = objective.optimizer(part_of(model, objective.trains))
        if group.world_size > 1 and settings.strategy == "zero1":
            for share, groups in zip(
                shares, rebuilt(optimizer, group)._partition_parameters(), strict=True
            ):
                share += [(number, id(parameter)) for own in groups for parameter in own["params"]]
        if group.world_size > 1 and settings.strategy == "deepspeed":
            require_elementwise(optimizer, stage=settings.deepspeed.stage)
        for parameter in (
            parameter for own in optimizer.param_groups for parameter in own["params"]
        ):
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        try:
            optimizer.step()
        except RuntimeError as error:
            if "meta" not in str(error):
                raise
            raise ConfigError(
                f"{type(optimizer).__name__} reads numbers as it steps, which are not there without memory."
            ) from error
        optimizer.zero_grad()
        for parameter, state in optimizer.state.items():
            tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
            states[number, id(parameter)] = _held(tensors), _whole(tensors)
    return states, shares


def _gathered(
    pieces: Sequence[Sequence[nn.Parameter]], width: int, settings: Settings, *, accumulates: bool
) -> int:
    """Returns the bytes of the root's weights, of two more pieces (one in use, one on its way), and of gradients not yet split."""
    *others, root = [sum(parameter.numel() for parameter in piece) for piece in pieces]
    gradients = sum([root, *others]) if accumulates else max([root, *others])
    return (root + 2 * max(others, default=0)) * width + gradients * weight_dtype(
        settings.precision
    ).itemsize


def _sent(
    pieces: Sequence[Sequence[nn.Parameter]],
    trained: Sequence[nn.Parameter],
    width: int,
    settings: Settings,
    *,
    group: Group,
    rounds: int,
    backend: Backend,
) -> float:
    """Returns the bytes that a rank sends in a step. What is split is padded to equal parts."""
    ranks, wide = group.world_size, weight_dtype(settings.precision).itemsize
    whole = sum(parameter.numel() for parameter in trained)
    summed = 2 * whole * (2 if settings.comm != "fp32" else wide)
    if settings.strategy == "deepspeed":
        everything = sum(parameter.numel() for piece in pieces for parameter in piece) * wide
        gathers = everything * (
            1 if everything <= _limits(settings)[1] else 2
        )  # once where all may stay from forward to backward
        scatters = whole * wide * (2 if backend == "gloo" else 1)
        stages = (
            summed,
            summed + whole * wide,
            rounds * summed + whole * wide,
            rounds * (gathers + scatters),
        )  # seen: 1 and 2 all-reduce
        return (ranks - 1) / ranks * stages[settings.deepspeed.stage]
    if settings.strategy != "fsdp" or ranks == 1:
        return (
            (ranks - 1) / ranks * (summed + (whole * wide if settings.strategy == "zero1" else 0))
        )
    line = group.topology.local_world_size if settings.fsdp.hybrid else ranks

    def padded(parameters: Sequence[nn.Parameter]) -> int:
        return (
            sum(
                -(-parameter.shape[0] // line) * (parameter.numel() // max(1, parameter.shape[0]))
                for parameter in parameters
            )
            * line
        )

    *others, root = map(padded, pieces)
    summed = (
        padded([parameter for piece in pieces for parameter in piece if parameter.requires_grad])
        * wide
    )
    gathers = (
        rounds * (root + 2 * sum(others)) * width
    )  # the root stays whole from forward to backward
    scatters = summed * (2 if backend == "gloo" else 1)
    lines = ranks // line
    return (line - 1) / line * (gathers + scatters) + 2 * (lines - 1) / lines * summed / line
