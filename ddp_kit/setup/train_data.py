"""From a recipe's `train_data` to this rank's feed."""

from torch import nn

from ddp_kit.data.agreement import require_same_lengths, require_same_order
from ddp_kit.data.dataset import Data, as_data
from ddp_kit.data.iterable import is_stateful
from ddp_kit.data.loader import Feed, build_loader
from ddp_kit.data.seeding import made_under_seed
from ddp_kit.data.stream_checks import require_resumable
from ddp_kit.data.transfer import Placement
from ddp_kit.distributed.process_group import Group
from ddp_kit.recipe import Recipe
from ddp_kit.settings import Settings
from ddp_kit.setup.find_batch_size import find_micro_batch


def made_train_data(recipe: Recipe, settings: Settings, group: Group) -> Data:
    """Makes the recipe's data set. Every rank calls it.

    Raises: DataError for data that cannot be trained on, or are others on another rank.
    """
    what = "training data"
    data = as_data(made_under_seed(recipe.train_data, seed=settings.seed, what=what), what=what)
    require_same_lengths(group, {"": data.shared_length}, what=what)
    if data.is_iterable and is_stateful(data.dataset) and settings.resume_data == "state":
        require_resumable(data, seed=settings.seed, after=settings.global_batch)
    return data


def train_feed(
    model: nn.Module,
    recipe: Recipe,
    data: Data,
    settings: Settings,
    group: Group,
    *,
    placement: Placement,
) -> Feed:
    """Makes the feed of the data set. Every rank calls it.

    Raises: DataError for data that are others on another rank; ConfigError for sizes and flags that
        do not fit them.
    """
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
