"""`--micro-batch auto`: trying out, before training, what fits into memory.

It is never done by halving in the middle of training: a batch whose backward was half done cannot
be split again.
"""

from collections.abc import Sequence

import torch
from torch import nn

from ddp_kit.data.batch_plan import plan_batches
from ddp_kit.data.dataset import Data
from ddp_kit.data.loader import feed_of
from ddp_kit.data.reader import MicroBatch
from ddp_kit.data.transfer import Placement
from ddp_kit.distributed.collectives import max_over_ranks
from ddp_kit.distributed.out_of_memory import is_out_of_memory
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, summary
from ddp_kit.io.logs import logger
from ddp_kit.model_state.untouched import untouched
from ddp_kit.recipe import Objective
from ddp_kit.settings import Settings
from ddp_kit.training.state import LossCall


def find_micro_batch(
    model: nn.Module,
    parts: Sequence[Objective],
    data: Data,
    *,
    placement: Placement,
    settings: Settings,
    group: Group,
) -> int:
    """Returns the largest divisor of the global batch that fits on every rank.

    It is at most a rank's share. Every rank calls it: each tries alone, and all take the smallest
    that was found.

    Raises: ConfigError if not even one sample fits.
    """
    own = _largest_that_fits(
        model, parts, data, placement=placement, settings=settings, group=group
    )
    fitting = -max_over_ranks(group, [-own])[0]
    if not fitting:
        raise ConfigError(
            "--micro-batch auto: not even one sample fits into memory on every rank. "
            "Try --activation-checkpointing or a smaller model."
        )
    return fitting


def _largest_that_fits(
    model: nn.Module,
    parts: Sequence[Objective],
    data: Data,
    *,
    placement: Placement,
    settings: Settings,
    group: Group,
) -> int:
    """Tries the divisors on this rank, the largest first. Returns: 0 if none fits."""
    share = -(-settings.global_batch // group.world_size)
    found = 0
    with untouched(model) as snapshot:
        for size in range(share, 0, -1):
            if settings.global_batch % size:
                continue
            fits = _fits(
                model, parts, data, size, placement=placement, settings=settings, group=group
            )
            snapshot.put_back()
            if fits:
                found = size
                break
    model.zero_grad(set_to_none=True)
    return found


def _fits(
    model: nn.Module,
    parts: Sequence[Objective],
    data: Data,
    size: int,
    *,
    placement: Placement,
    settings: Settings,
    group: Group,
) -> bool:
    """Runs each loss forward and backward on `size` samples.

    Optimizer state is not there yet, so room for it and a twentieth of the memory is left free on
    CUDA.
    """
    plan = plan_batches(size, micro_batch=0, world_size=1)
    if group.device.type == "cuda":
        # What a larger size has left.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(group.device)
    try:
        feed = feed_of(
            data,
            plan=plan,
            rank=0,
            seed=settings.seed,
            placement=placement,
            num_workers=settings.num_workers,
        )
        batch: MicroBatch = feed.dry_run_batch()
        for part in parts:
            call = LossCall(model, part.loss, precision=settings.precision, device=group.device)
            call(batch.batch)[0].backward()
        if group.device.type == "cuda":
            return _leaves_room(model, group.device)
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        # Where nothing fits at last, this may be why: cuDNN's word means other things too.
        words = summary(error).partition("\n")[0]
        logger.info("--micro-batch auto: %d samples do not fit: %s", size, words)
        return False
    return True


def _leaves_room(model: nn.Module, device: torch.device) -> bool:
    """Whether the peak of a trial leaves room for the state of an optimizer such as Adam."""
    total = torch.cuda.get_device_properties(device).total_memory
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return torch.cuda.max_memory_allocated(device) + 2 * weights < 0.95 * total
