"""Loops of one's own and their folders: other data than a checkpoint's, and two trainings in one folder."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import classify, vectors
from torch import nn
from torch.utils.data import IterableDataset

import ddp_kit
from ddp_kit import Data
from ddp_kit.checkpoint import own_lock
from ddp_kit.distributed.topology import read_topology
from ddp_kit.errors import ConfigError
from ddp_kit.testing import RanksError, run_ranks


class Shard(IterableDataset[Any]):
    """Each rank's own part of the samples."""

    def __iter__(self) -> Iterator[Any]:
        topology = read_topology()
        samples = vectors()
        for i in range(topology.rank, len(samples), topology.world_size):
            yield samples[i]

    def __len__(self) -> int:
        return len(vectors()) // read_topology().world_size


def loop(folder: str, length: int, end: int, change: tuple[str, ...] = ()) -> int:
    """Trains to a step and saves; a length of 0 are streams of each rank's own."""
    with ddp_kit.process_group(device="cpu") as group:
        torch.manual_seed(0)
        model = nn.Linear(6, 4)
        data = Data(vectors(length)) if length else Data(Shard(), sharded=True)
        feed = ddp_kit.build_loader(data, group=group, global_batch=24)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        training = ddp_kit.wrap(model, optimizer, classify, group=group, feed=feed)
        begin = ddp_kit.restore(training, folder, change=change)
        for batch in feed.batches(start=begin, end=end):
            ddp_kit.train_step(training, batch)
        ddp_kit.save(training, folder)
        return begin


@pytest.mark.parametrize("ranks", [1, 2])
def test_data_of_another_length_are_refused_unless_that_is_meant(
    tmp_path: Path, ranks: int
) -> None:
    folder = str(tmp_path)
    run_ranks(loop, ranks, folder, 240, 2, group=False)
    said = r"saved with other training data \(240 samples\) than this loop has \(192 samples\)"
    with pytest.raises(RanksError, match=said):
        run_ranks(loop, ranks, folder, 192, 4, group=False)
    assert run_ranks(loop, ranks, folder, 240, 3, group=False)[0] == 2
    assert run_ranks(loop, ranks, folder, 192, 4, ("data",), group=False)[0] == 3


def test_streams_of_each_ranks_own_are_refused_on_another_number_of_ranks(tmp_path: Path) -> None:
    folder = str(tmp_path)
    run_ranks(loop, 2, folder, 0, 2, group=False)
    with pytest.raises(RanksError, match=r"saved with other (ranks of the )?training data"):
        run_ranks(loop, 1, folder, 0, 3, group=False)
    assert run_ranks(loop, 2, folder, 0, 3, group=False)[0] == 2


def holds(folder: str, ready: Any) -> None:
    with ddp_kit.process_group(device="cpu") as group:
        own_lock.lock_folder(group, Path(folder))
        ready.set()
        time.sleep(600)


def test_two_trainings_do_not_save_into_one_folder_until_one_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_lock, "WITHIN_S", 0.3)
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=holds, args=(str(tmp_path), ready))
    other.start()
    try:
        assert ready.wait(120)
        with pytest.raises(ConfigError, match="another process saves its checkpoints into"):
            loop(str(tmp_path), 240, 1)
        assert not list(tmp_path.glob("step-*"))
    finally:
        assert other.pid is not None
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    assert loop(str(tmp_path), 240, 1) == 0
    # And again in this process, whose training before has ended.
    assert loop(str(tmp_path), 240, 2) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000001", "step-00000002"}
