"""What a run would hold, send and write on many ranks, found out in one process.

Activations, which depend on the loss, and what libraries allocate for themselves are left out.
"""

from dataclasses import dataclass

from ddp_kit.cli.plan import strategy_costs
from ddp_kit.cli.plan.model_size import Backend, measure
from ddp_kit.data.batch_plan import BatchPlan
from ddp_kit.distributed.process_group import Group
from ddp_kit.recipe import Recipe
from ddp_kit.settings import Settings

STRATEGIES = {
    "ddp": strategy_costs.ddp,
    "zero1": strategy_costs.zero1,
    "fsdp": strategy_costs.fsdp,
    "deepspeed": strategy_costs.deepspeed,
}


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
        on_device = self.buffers + self.gathered
        if self.is_offloaded:
            return on_device
        return on_device + self.weights + self.gradients + self.moments + self.average


def costs_of(
    recipe: Recipe, settings: Settings, plan: BatchPlan, *, group: Group, backend: Backend
) -> Costs:
    """Returns what training would cost the group's ranks. It needs no memory for weights.

    Raises: ConfigError for what the strategy cannot split, and for an optimizer that cannot be
        stepped without memory.
    """
    size = measure(recipe, settings, plan, group=group, backend=backend)
    strategy = STRATEGIES["ddp"]  # one process is not wrapped at all
    if group.world_size > 1:
        strategy = STRATEGIES[settings.strategy]
    rank = strategy(size)
    average = 0
    if settings.ema:
        average = rank.average + size.averaged_buffers
    dealt_out = size.checkpoint - rank.written_by_owners
    return Costs(
        parameters=size.parameters,
        weights=rank.weights,
        gradients=rank.gradients,
        moments=rank.moments,
        average=average,
        buffers=size.buffers,
        gathered=rank.gathered,
        is_offloaded=rank.is_offloaded,
        sent=round(rank.sent),
        checkpoint=size.checkpoint,
        written=dealt_out // group.world_size + rank.written_alone,
    )
