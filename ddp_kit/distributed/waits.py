"""Waiting for all ranks of a process group, and how long."""

from datetime import timedelta

import torch
import torch.distributed as dist


def wait_for_all(group: dist.ProcessGroup, device: torch.device | str) -> None:
    """Returns once every rank has connected: leaving before would fail a peer that has not."""
    dist.all_reduce(torch.zeros(1, device=device), group=group)


def set_timeout(group: dist.ProcessGroup, *, timeout_s: float) -> None:
    """Sets how long its collectives wait from now on. Any thread may call it."""
    # Public since torch 2.15.
    set_it = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    set_it(timedelta(seconds=timeout_s), group)
