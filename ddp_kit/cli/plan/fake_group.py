"""A process group of many ranks in one process, whose collectives do nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ddp_kit.distributed.failures import FailureReport
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.topology import Topology


@contextmanager
def fake_group(*, ranks: int, ranks_per_node: int) -> Iterator[Group]:
    """Yields the group of rank 0 of `ranks`."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    topology = Topology(
        world_size=ranks,
        local_world_size=min(ranks, ranks_per_node),
        nodes=-(-ranks // ranks_per_node),
    )
    failure_report = FailureReport(rank=0, world_size=ranks)
    group = Group(topology=topology, device=torch.device("cpu"), failure_report=failure_report)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        group.pg = group.control_pg = group.sums_pg = dist.group.WORLD
        yield group
        group.closing.close()
    finally:
        group.pg = group.control_pg = group.sums_pg = None
        dist.destroy_process_group()
