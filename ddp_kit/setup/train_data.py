"""From a recipe's `train_data` to this rank's feed."""

from torch import nn

from ddp_kit.data.agreement import require_same_lengths, require_same_order
from ddp_kit.data.batch_plan import plan_batches
from ddp_kit.data.dataset import Data, as_data
from ddp_kit.data.iterable import is_stateful
from ddp_kit.data.loader import Feed, build_loader, feed_of
from ddp_kit.data.seeding import made_under_seed
from ddp_kit.data.stream_checks import require_resumable
from ddp_kit.data.transfer import Placement
from ddp_kit.distributed.process_group import Group
from ddp_kit.recipe import Recipe
from ddp_kit.settings import Settings
from ddp_kit.setup.find_batch_size import find_micro_batch
from ddp_kit.setup.model import choose_memory_format, placement_of
from ddp_kit.training.state import LossCall


def train_feed(model: nn.Module, recipe: Recipe, settings: Settings, group: Group) -> Feed:
    """Makes the recipe's data set, and its feed for the memory format that the model can have.

    Every rank calls it.

    Raises: DataError for data that cannot be trained on, or are others on another rank; ConfigError
        for sizes and flags that do not fit them.
    """
    what = "training data"
    data = as_data(made_under_seed(recipe.train_data, seed=settings.seed, what=what), what=what)
    require_same_lengths(group, {"": data.shared_length}, what=what)
    if data.is_iterable and is_stateful(data.dataset) and settings.resume_data == "state":
        require_resumable(data, seed=settings.seed, after=settings.global_batch)
    wanted = placement_of(model, settings, group)
    placement = choose_memory_format(
        model, wanted, lambda: _run_losses(model, recipe, data, wanted, settings, group)
    )
    micro_batch = settings.micro_batch
    if micro_batch == "auto":
        micro_batch = find_micro_batch(
            model, recipe.parts(), data, placement=placement, settings=settings, group=group
        )
    feed = build_loader(
        data,
        group=group,
        global_batch=settings.global_batch,
        micro_batch=micro_batch,
        seed=settings.seed,
        num_workers=settings.num_workers,
        placement=placement,
    )
    if feed.sampler is not None:
        require_same_order(group, feed.sampler.epoch_order(0), epoch=0)
    return feed


def _run_losses(
    model: nn.Module,
    recipe: Recipe,
    data: Data,
    placement: Placement,
    settings: Settings,
    group: Group,
) -> None:
    """Runs the losses on two samples, as many as BatchNorm needs."""
    plan = plan_batches(min(2, settings.global_batch), micro_batch=0, world_size=1)
    feed = feed_of(
        data,
        plan=plan,
        rank=0,
        seed=settings.seed,
        placement=placement,
        num_workers=settings.num_workers,
    )
    batch = feed.dry_run_batch().batch
    for part in recipe.parts():
        LossCall(model, part.loss, precision=settings.precision, device=group.device)(batch)
