"""first_on_node with real processes: one makes, the others wait, a killed maker leaves nothing."""

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from paths import ROOT

from ddp_kit.data import first_on_node as module
from ddp_kit.data.first_on_node import cache_path, first_on_node
from ddp_kit.errors import DataError

CHILD = """
import os, sys, time
from pathlib import Path
from ddp_kit.data.first_on_node import first_on_node

def make(temporary):
    with open(sys.argv[2], "a") as log:
        log.write(f"{os.getpid()}\\n")
    temporary.mkdir()
    (temporary / "first").write_text("1")
    time.sleep(float(sys.argv[3]))
    (temporary / "second").write_text("2")

path = first_on_node(Path(sys.argv[1]), make)
sys.exit(0 if sorted(each.name for each in path.iterdir()) == ["first", "second"] else 3)
"""


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def start(path: Path, log: Path, *, seconds: float) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), str(log), str(seconds)], env=environment
    )


def wait_for(condition, *, deadline_s: float = 10.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, "deadline"
        time.sleep(0.01)


def makers(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def test_of_four_processes_one_makes_and_all_see_the_whole(tmp_path):
    path = tmp_path / "data" / "set"
    log = tmp_path / "log"
    processes = [start(path, log, seconds=0.3) for _ in range(4)]
    assert [process.wait(timeout=20) for process in processes] == [0] * 4
    assert len(makers(log)) == 1
    assert names(path.parent) == ["set"]


def test_a_killed_maker_leaves_nothing_under_the_name_and_a_waiting_one_makes_it(tmp_path):
    path = tmp_path / "set"
    log = tmp_path / "log"
    with start(path, log, seconds=60) as maker:
        wait_for(lambda: makers(log))
        with start(path, log, seconds=0) as waiting:
            time.sleep(0.2)
            os.kill(maker.pid, signal.SIGKILL)
            maker.wait(timeout=10)
            assert waiting.wait(timeout=20) == 0
    assert len(makers(log)) == 2
    assert names(tmp_path) == ["log", "set"]


def test_a_maker_that_raises_leaves_nothing_and_the_next_call_makes(tmp_path):
    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "disk full")

    path = tmp_path / "file"
    with pytest.raises(OSError, match="disk full"):
        first_on_node(path, fails)
    assert names(tmp_path) == []
    first_on_node(path, lambda temporary: temporary.write_text("whole"))
    assert path.read_text() == "whole"
    assert names(tmp_path) == ["file"]


def test_what_is_there_is_neither_made_nor_locked(tmp_path):
    path = tmp_path / "file"
    path.write_text("there")
    first_on_node(path, lambda temporary: pytest.fail("made again"))
    assert names(tmp_path) == ["file"]


def test_another_nodes_folder_that_came_first_is_kept(tmp_path):
    path = tmp_path / "set"

    def make(temporary: Path) -> None:
        temporary.mkdir()
        (temporary / "ours").touch()
        path.mkdir()  # a node whose lock we cannot see has renamed its own meanwhile
        (path / "theirs").touch()

    first_on_node(path, make)
    assert names(path) == ["theirs"]
    assert names(tmp_path) == ["set"]


def test_a_long_wait_says_what_it_waits_for_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(module, "QUIET_S", 0.2)
    path = tmp_path / "set"
    entered = threading.Event()
    leave = threading.Event()

    def make(temporary: Path) -> None:
        entered.set()
        assert leave.wait(10)
        temporary.touch()

    first = threading.Thread(target=first_on_node, args=(path, make))
    second = threading.Thread(target=first_on_node, args=(path, make))
    with caplog.at_level(logging.INFO, "ddp_kit"):
        first.start()
        assert entered.wait(10)
        second.start()
        wait_for(lambda: caplog.records)
        time.sleep(0.5)
        leave.set()
        first.join(10)
        second.join(10)
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting for another process to make {path} (lock: {path}.lock)"
    ]


def test_a_folder_that_cannot_be_written_is_named_with_the_way_out(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="DDP_KIT_CACHE"):
        first_on_node(tmp_path / "file" / "below" / "set", lambda temporary: None)


def test_a_cache_lies_beside_the_data_or_where_the_environment_says(tmp_path, monkeypatch):
    data = tmp_path / "data" / "train"
    data.mkdir(parents=True)
    monkeypatch.delenv("DDP_KIT_CACHE", raising=False)
    assert cache_path(data, "train.npy") == tmp_path / "data" / "train.npy"
    monkeypatch.setenv("DDP_KIT_CACHE", str(tmp_path / "cache"))
    chosen = cache_path(data, "train.npy")
    assert chosen.parent.parent == tmp_path / "cache"
    assert chosen.name == "train.npy"
    assert chosen != cache_path(tmp_path / "train", "train.npy")


def test_a_cache_of_read_only_data_lies_in_the_home_folder_unless_it_is_beside_already(
    tmp_path, monkeypatch
):
    data = tmp_path / "data" / "train"
    data.mkdir(parents=True)
    monkeypatch.delenv("DDP_KIT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    # root may write anywhere: permissions would prove nothing
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cache_path(data, "train.npy").is_relative_to(tmp_path / ".cache" / "ddp_kit")
    (tmp_path / "data" / "train.npy").touch()
    assert cache_path(data, "train.npy") == tmp_path / "data" / "train.npy"
