"""What `--exact` promises: the same weights and losses, bit for bit, at any number of ranks that fits.

Owns: which numbers of ranks fit, and refusing data that cannot be exact.
Refuses: the arithmetic. Gradients are summed in `strategies.exact`, running statistics in `buffers`, both along `tree`; counts, losses and
metrics have a slot for each micro-batch (`counts`, `report`, `evaluation`) in every mode.
"""

from ddp_kit.data.batch_plan import BatchPlan
from ddp_kit.data.loader import Feed
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError


def fitting_world_sizes(micro_batches: int) -> list[int]:
    """Returns the numbers of ranks that hold whole subtrees of the tree over the micro-batches: a power of two of them each."""
    divisors = [ranks for ranks in range(1, micro_batches + 1) if micro_batches % ranks == 0]
    return [ranks for ranks in divisors if ranks == 1 or (micro_batches // ranks).bit_count() == 1]


def require_fit(feed: Feed, group: Group) -> None:
    """Raises: ConfigError on every rank if a run of this feed on these ranks cannot be exact."""
    if feed.sampler is None:
        raise ConfigError("--exact: the training data is iterable, and its order is its own. Give it __getitem__ and __len__.")
    require_subtrees(feed.plan, world_size=group.world_size)


def require_subtrees(plan: BatchPlan, *, world_size: int) -> None:
    """Raises: ConfigError if some of the ranks would not hold whole subtrees."""
    whole, micro = plan.global_batch, plan.stated or plan.global_batch
    fitting = fitting_world_sizes(whole // micro) if whole % micro == 0 else []
    if world_size not in fitting:
        raise ConfigError(
            f"--exact: {whole} / {micro} = {whole // micro} micro-batches do not fit {world_size} ranks. "
            f"World sizes that fit: {', '.join(map(str, fitting))}."
        )
