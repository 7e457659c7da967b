"""What the split of data and batches does to a model's numbers, said once at start."""

from torch import nn

from ddp_kit.data.batch_plan import BatchPlan, splits_that_keep
from ddp_kit.data.loader import Feed
from ddp_kit.distributed.process_group import Group
from ddp_kit.settings import Settings


def data_notes(feed: Feed, group: Group) -> list[str]:
    """Returns what of the data makes the numbers depend on the number of ranks."""
    if not feed.data.sharded or group.world_size == 1:
        return []
    return [
        "the training data are each rank's own (sharded=True): which samples a step sees "
        "depends on the number of ranks"
    ]


def split_notes(model: nn.Module, plan: BatchPlan, settings: Settings, group: Group) -> list[str]:
    """Returns which layers make the numbers depend on the split, and which flag mends it."""
    if plan.is_invariant or settings.sync_batchnorm or group.world_size == 1:
        return []
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    layers = {type(module).__name__ for module in model.modules() if isinstance(module, kinds)}
    if not layers:
        return []
    keeps = splits_that_keep(settings.global_batch, world_size=group.world_size)
    mend = (
        f"--micro-batch {keeps} keeps the numbers the same on 1 to "
        f"{settings.global_batch // keeps} ranks"
    )
    # BatchNorm cannot normalise a single sample.
    if keeps == 1:
        mend = "no --micro-batch mends it; a --global-batch with more divisors would"
    return [
        f"{', '.join(sorted(layers))} see one micro-batch at a time, "
        f"and at another number of ranks it would be another one: {mend}"
    ]
