"""What a recipe's model and optimizers hold, counted on the meta device.

The real FSDP splits the model and the real optimizers are stepped once, so what they keep is
counted and not assumed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from ddp_kit.checkpoint.weights import tie, tied_names
from ddp_kit.data.batch_plan import BatchPlan
from ddp_kit.distributed.local_shard import local
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.recipe import Recipe
from ddp_kit.settings import Settings
from ddp_kit.setup.frozen_words import freeze_for_good
from ddp_kit.setup.parts import part_of
from ddp_kit.strategies import choose_strategy
from ddp_kit.strategies.checks import require_elementwise, require_splittable
from ddp_kit.strategies.fsdp import gathered_dtype
from ddp_kit.strategies.fsdp_modules import modules_to_wrap
from ddp_kit.strategies.precision import placed, weight_dtype
from ddp_kit.strategies.zero1 import rebuilt
from ddp_kit.training.ema import is_weight

Backend = Literal["nccl", "gloo"]
Key = tuple[int, int]  # number of an objective, identity of a parameter


@dataclass(frozen=True, kw_only=True)
class OptimizerBytes:
    """Bytes of the optimizers' state."""

    on_rank: int  # before DeepSpeed or zero1 split it
    whole: int  # of all ranks together
    zero1_shares: list[int]  # of each rank


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A recipe on some ranks, in bytes where nothing else is said."""

    settings: Settings
    ranks: int
    ranks_per_node: int
    backend: Backend
    passes: int  # the most micro-batches that a rank runs in a step
    pieces: list[list[nn.Parameter]]  # what FSDP gathers together, the root's last
    trained: list[nn.Parameter]  # once for each objective that trains it: each sums its gradients
    gathered_width: int  # of a number of a weight that FSDP gathers
    weight_width: int  # of a number of a weight at rest
    parameters: int  # their number
    weights: int  # on this rank
    whole_weights: int
    gradients: int  # on this rank
    buffers: int
    averaged_buffers: int  # of them: the EMA has a copy
    optimizer: OptimizerBytes

    @property
    def weight_copies(self) -> int:
        """How often a checkpoint has the weights: once more for the EMA."""
        return 2 if self.settings.ema else 1

    @property
    def saved_buffers(self) -> int:
        """Bytes of buffers in a checkpoint."""
        if self.settings.ema:
            return self.buffers + self.averaged_buffers
        return self.buffers

    @property
    def checkpoint(self) -> int:
        """Bytes that all ranks together write, without headers."""
        weights = self.whole_weights * self.weight_copies
        return weights + self.saved_buffers + self.optimizer.whole


def measure(
    recipe: Recipe, settings: Settings, plan: BatchPlan, *, group: Group, backend: Backend
) -> ModelSize:
    """Builds the model and its optimizers without memory, and counts.

    Raises: ConfigError for what the strategy cannot split, and for an optimizer that cannot be
        stepped without memory.
    """
    model = build(recipe, settings)
    thaws = callable(recipe.frozen)
    require_splittable(model, settings, objectives=len(recipe.parts()), thaws=thaws)
    weight_type = weight_dtype(settings.precision)
    gathered_type = gathered_dtype(model, settings.precision) or weight_type
    # Before FSDP puts its parts in the place of the parameters.
    pieces = _pieces(model, settings)
    if settings.strategy == "fsdp" and group.world_size > 1:
        choose_strategy(group, settings).shard(model)
    optimizer = _optimizer_bytes(recipe, model, settings, group)
    trained: list[nn.Parameter] = []
    for objective in recipe.parts():
        part = part_of(model, objective.trains)
        trained += [parameter for parameter in part.parameters() if parameter.requires_grad]
    return ModelSize(
        settings=settings,
        ranks=group.world_size,
        ranks_per_node=group.topology.local_world_size,
        backend=backend,
        passes=max(len(plan.of_rank(rank)) for rank in range(group.world_size)),
        pieces=pieces,
        trained=trained,
        gathered_width=gathered_type.itemsize,
        weight_width=weight_type.itemsize,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights=_on_rank(model.parameters()),
        whole_weights=_whole(model.parameters()),
        gradients=_on_rank(trained),
        buffers=_on_rank(model.buffers()),
        averaged_buffers=_on_rank(buffer for buffer in model.buffers() if is_weight(buffer)),
        optimizer=optimizer,
    )


def build(recipe: Recipe, settings: Settings) -> nn.Module:
    """Returns the recipe's model without memory.

    A model that needs values as it is built (a file's, or a rate of each layer) has some first.
    """
    try:
        with torch.device("meta"):
            model = recipe.model()
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        model = recipe.model()
    freeze_for_good(model, recipe.frozen)
    tied = tied_names(model)
    model = placed(model, device="meta", dtype=weight_dtype(settings.precision))
    tie(model, tied)
    return model


def _on_rank(tensors: Iterable[torch.Tensor]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)


def _whole(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _pieces(model: nn.Module, settings: Settings) -> list[list[nn.Parameter]]:
    taken: set[int] = set()
    pieces = []
    for module in [*modules_to_wrap(model, settings.fsdp), model]:
        piece = [parameter for parameter in module.parameters() if id(parameter) not in taken]
        taken.update(id(parameter) for parameter in piece)
        pieces.append(piece)
    return pieces


def _optimizer_bytes(
    recipe: Recipe, model: nn.Module, settings: Settings, group: Group
) -> OptimizerBytes:
    """Steps each objective's optimizer once and counts what it keeps.

    Raises: ConfigError for an optimizer that the strategy cannot split, or that cannot be stepped
        without memory.
    """
    on_rank: dict[Key, int] = {}
    whole = 0
    shares: list[list[Key]] = [[] for _ in range(group.world_size)]
    for number, objective in enumerate(recipe.parts()):
        optimizer = objective.optimizer(part_of(model, objective.trains))
        if group.world_size > 1 and settings.strategy == "zero1":
            _deal_out(optimizer, group, number, shares)
        if group.world_size > 1 and settings.strategy == "deepspeed":
            require_elementwise(optimizer, stage=settings.deepspeed.stage)
        _step(optimizer)
        for parameter, state in optimizer.state.items():
            tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
            on_rank[number, id(parameter)] = _on_rank(tensors)
            whole += _whole(tensors)
    return OptimizerBytes(
        on_rank=sum(on_rank.values()),
        whole=whole,
        # A frozen parameter has a rank that owns it, and no state.
        zero1_shares=[sum(on_rank.get(key, 0) for key in share) for share in shares],
    )


def _deal_out(optimizer: Optimizer, group: Group, number: int, shares: list[list[Key]]) -> None:
    """Adds to each rank's share the parameters of objective `number` that zero1 gives it."""
    partition = rebuilt(optimizer, group)._partition_parameters()
    for share, parameter_groups in zip(shares, partition, strict=True):
        for parameter_group in parameter_groups:
            share += [(number, id(parameter)) for parameter in parameter_group["params"]]


def _step(optimizer: Optimizer) -> None:
    """Steps an optimizer with gradients that have no values."""
    for parameter_group in optimizer.param_groups:
        for parameter in parameter_group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except RuntimeError as error:
        if "meta" not in str(error):
            raise
        kind = type(optimizer).__name__
        raise ConfigError(
            f"{kind} reads numbers as it steps, which are not there without memory."
        ) from error
    optimizer.zero_grad()
