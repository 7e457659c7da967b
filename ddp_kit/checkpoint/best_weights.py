"""The weights of the best checkpoint in the model, for as long as the test data are evaluated."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from ddp_kit.checkpoint.extra_state import extra_of
from ddp_kit.checkpoint.format.layout import DamagedError
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.checkpoint.format.reader import open_checkpoint
from ddp_kit.checkpoint.format.storage import Storage
from ddp_kit.checkpoint.forward_values import attributes_of
from ddp_kit.checkpoint.items import kind_of_item
from ddp_kit.checkpoint.retention import Keep, best, manifests_of
from ddp_kit.checkpoint.state_dict import model_tensors
from ddp_kit.distributed.collectives import from_rank
from ddp_kit.distributed.local_shard import local
from ddp_kit.distributed.process_group import Group
from ddp_kit.io.logs import logger
from ddp_kit.training.state import Training


@contextmanager
def best_weights(training: Training, storage: Storage, *, keep: Keep) -> Iterator[int]:
    """Puts the weights of the best checkpoint, as they were evaluated, into the model, and the last
    ones back at the end. Yields its step; without one 0, and the last weights are used as
    evaluation uses them. Every rank calls it.
    """
    opened = None
    if keep.metric:
        opened = _open_best(storage, keep, group=training.group)
    average = training.average
    if opened is None:
        with nullcontext() if average is None else average.applied():
            yield 0
        return
    tensors = model_tensors(training.model)
    # A table that the run has made longer since stays as it is.
    kinds = opened.kinds
    live = {
        name: own for name, own in tensors.items() if kinds.get(name) == kind_of_item(name, own)
    }
    last = {name: local(tensor).clone() for name, tensor in live.items()}
    try:
        opened.copy_into(live)
        if average is not None:
            averaged = {}
            for name in average.names:
                # The run may average since a later step than that.
                if f"model/{name}" in live and f"ema/{name}" in opened.kinds:
                    averaged[f"ema/{name}"] = live[f"model/{name}"]
            opened.copy_into(averaged)
        with extra_of(opened, training.model), attributes_of(opened, training.model):
            yield opened.manifest.step
    finally:
        with torch.no_grad():
            for name, tensor in last.items():
                local(live[name]).copy_(tensor)


def _open_best(storage: Storage, keep: Keep, *, group: Group) -> Opened | None:
    """Returns the best checkpoint that is whole, None without one. Every rank calls it."""
    damaged: set[int] = set()
    while True:
        step = 0
        if group.rank == 0:
            step = _best_step(storage, keep, damaged)
        step = int(from_rank(group, str(step).encode()))
        if not step:
            return None
        try:
            return open_checkpoint(storage, step, group=group)
        except DamagedError as error:
            logger.warning(
                "the best checkpoint, of step %d, is damaged (%s): the next best one is used",
                step,
                error,
            )
            damaged.add(step)


def _best_step(storage: Storage, keep: Keep, damaged: set[int]) -> int:
    """Returns the step of the best checkpoint that is not known to be damaged, 0 without one."""
    manifests = [manifest for manifest in manifests_of(storage) if manifest.step not in damaged]
    found = best(manifests, metric=keep.metric, mode=keep.mode)
    return found.step if found else 0
