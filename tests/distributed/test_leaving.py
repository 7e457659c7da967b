"""Leaving the process groups after an error. There is no GPU here: groups of NCCL are stood in for by names that note the calls."""

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lives import alone

import ddp_kit.distributed.process_group as process_groups
from ddp_kit.distributed.process_group import Group, process_group
from ddp_kit.testing import start_ranks


class Made:
    """A process group with a backend, as far as leaving it goes."""

    def __init__(self, name: str, backend: str, calls: list[str]):
        self.name, self.backend, self.calls = name, backend, calls

    def abort(self) -> None:
        self.calls.append(f"abort {self.name}")


def as_on_cuda(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> Group:
    """Returns a group as `_join` makes it on CUDA: the sums' group is the training group."""

    def made(name: str, backend: str = "nccl") -> Any:
        return Made(name, backend, calls)

    group = alone()
    group.device = torch.device("cuda", 0)
    group.pg = group.sums_pg = made("training")
    group.control_pg = made("control", "gloo")
    group.others += [made("exchange"), made("saver", "gloo")]
    group.closing.callback(lambda: calls.append("threads are joined"))
    monkeypatch.setattr(process_groups.dist, "get_backend", lambda made: made.backend)
    return group


def test_after_an_error_all_nccl_groups_are_aborted_before_threads_are_joined_and_gloo_ones_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    group = as_on_cuda(calls, monkeypatch)
    control = group.control_pg
    before = sys.getrefcount(control)
    process_groups._leave(group, failed=True)
    assert calls == ["abort training", "abort exchange", "threads are joined"]
    assert (
        sys.getrefcount(control) == before
    )  # one fewer of the group's, and one that is never given back
    assert group.all == []


def test_without_an_error_no_group_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    process_groups._leave(as_on_cuda(calls, monkeypatch), failed=False)
    assert calls == ["threads are joined"]


def failing() -> str:
    with pytest.raises(KeyError), process_group(device="cpu") as group:
        assert {dist.get_backend(made) for made in group.all} == {"gloo"}
        group.join_another(backend="gloo")
        raise KeyError("the user's own")
    return str(dist.is_initialized())


def test_groups_of_gloo_are_left_as_ever_after_an_error() -> None:
    with start_ranks(failing, 2, group=False, deadline_s=60) as ranks:
        assert ranks.values() == ["False", "False"]
