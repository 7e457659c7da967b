"""After a power loss at any moment the newest checkpoint is whole, and none that was committed is lost.

The operations of several saves are recorded at the `Storage` seam. Then each beginning of that record is played again on a disk that
keeps only what is durable by the rules in `ddp_kit.checkpoint.format.storage`, all of it, or any part of what is not yet durable.
"""

import mmap
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from stored import is_equal, newest, state, write

from ddp_kit.checkpoint.format.storage import CHUNK, LocalDisk, Memory
from ddp_kit.checkpoint.retention import Keep, clear, retire, steps

SAVES = (2, 4, 6, 8)


@dataclass
class Recorder:
    """A storage that notes what is done. `without` leaves the durability of one kind out, as a forgotten fsync would."""

    without: str = ""
    inner: Memory = field(default_factory=Memory)
    log: list[tuple[str, Any]] = field(default_factory=list)

    def write(self, path: str, content: memoryview) -> None:
        self.inner.write(path, content)
        self.log.append(("write", (path, bytes(content))))
        if self.without != "fsync of a file":
            self.log.append(("fsync", path))

    def open(self, path: str) -> BinaryIO:
        return self.inner.open(path)

    def list(self, folder: str) -> "list[str]":
        return self.inner.list(folder)

    def sync(self, folder: str) -> None:
        if self.without != ("sync of the folder" if folder else "sync of the parent"):
            self.log.append(("sync", folder))

    def rename(self, old: str, new: str) -> None:
        self.inner.rename(old, new)
        self.log.append(("rename", (old, new)))

    def remove(self, path: str) -> None:
        for file in sorted(name for name in self.inner.files if name.startswith(f"{path}/")):
            self.log.append(("unlink", file))  # a folder goes file by file
        self.inner.remove(path)


@dataclass
class Disk:
    """What a disk may hold after a power loss. Names live in folders: `step-...` in "", files in their folder's own identity."""

    names: dict[str, int] = field(
        default_factory=dict
    )  # folder -> its identity, which a rename does not change
    files: dict[tuple[int, str], bytes] = field(default_factory=dict)
    fresh: int = 0

    def play(
        self, log: Sequence[tuple[str, Any]], *, draw: random.Random | None, keeps_all: bool = False
    ) -> Memory:
        """Plays a record. What is not durable at its end survives by chance with `draw`, else not, or wholly with `keeps_all`.

        A name in a folder is durable after the folder's sync, a file's content after its fsync, a renamed or new folder after that of
        "". What was done to one folder's names survives in its order, as journals have it: a part of it is a beginning.
        """
        contents: dict[tuple[int, str], tuple[bytes, bool]] = {}
        changes: list[tuple[int, Any]] = []  # (in which folder, what), in order; -1 is ""
        synced: dict[int, int] = {}  # folder -> how many of `changes` it has made durable
        now: dict[str, int] = {}
        for kind, what in log:
            if kind == "write":
                folder, _, name = what[0].partition("/")
                if folder not in now:
                    self.fresh += 1
                    now[folder] = self.fresh
                    changes.append((-1, ("add", folder, self.fresh)))
                contents[now[folder], name] = (what[1], False)
                changes.append((now[folder], ("file", name)))
            elif kind == "fsync":
                folder, _, name = what.partition("/")
                contents[now[folder], name] = (contents[now[folder], name][0], True)
            elif kind == "sync":
                synced[now[what] if what else -1] = len(changes)
            elif kind == "rename":
                now[what[1]] = now.pop(what[0])
                changes.append((-1, ("rename", *what)))
            else:
                folder, _, name = what.partition("/")
                changes.append((now[folder], ("unlink", name)))
        survives = {
            folder: self._until(folder, changes, synced.get(folder, 0), draw, keeps_all)
            for folder in {-1, *now.values(), *range(self.fresh + 1)}
        }
        for at, (folder, change) in enumerate(changes):
            if at < survives[folder]:
                self._apply(folder, change, contents, draw, keeps_all)
        memory = Memory()
        for name, number in self.names.items():
            for (owner, file), content in self.files.items():
                if owner == number:
                    memory.files[f"{name}/{file}"] = content
        return memory

    @staticmethod
    def _until(
        folder: int,
        changes: Sequence[tuple[int, Any]],
        synced: int,
        draw: random.Random | None,
        keeps_all: bool,
    ) -> int:
        if keeps_all:
            return len(changes)
        if draw is None:
            return synced
        return draw.randint(synced, len(changes))

    def _apply(
        self, folder: int, change: Any, contents: Any, draw: random.Random | None, keeps_all: bool
    ) -> None:
        if change[0] == "add":
            self.names[change[1]] = change[2]
        elif change[0] == "rename":
            self.names[change[2]] = self.names.pop(change[1])
        elif change[0] == "unlink":
            self.files.pop((folder, change[1]), None)
        else:
            content, is_durable = contents[folder, change[1]]
            if not is_durable and not keeps_all:
                content = content[: draw.randint(0, len(content))] if draw is not None else b""
            self.files[folder, change[1]] = content


def recorded(
    without: str = "", *, again: bool = False
) -> tuple[list[tuple[str, Any]], list[tuple[int, int]]]:
    """Returns the record of some saves with retention, and (length of the record, step) at the end of each save's commit."""
    storage, committed = Recorder(without), []
    for step in SAVES:
        write(storage, step, token=f"life{step}", metrics={"loss": 0.5})
        committed.append((len(storage.log), step))
        retire(storage, Keep(newest=1, metric="", mode="min"))
    if again:
        write(storage, SAVES[-1], token="again", metrics={"loss": 0.25})
    return storage.log, committed


def disks(log: Sequence[tuple[str, Any]], *, tries: int) -> Iterator[Memory]:
    yield Disk().play(log, draw=None)
    yield Disk().play(log, draw=None, keeps_all=True)
    for seed in range(tries):
        yield Disk().play(log, draw=random.Random(seed))


def faults(
    log: Sequence[tuple[str, Any]], committed: Sequence[tuple[int, int]], *, tries: int
) -> list[str]:
    """Returns what is wrong after a power loss at any moment: a checkpoint of a wrong content, or older than one committed before."""
    wrong = []
    for length in range(len(log) + 1):
        promised = max((step for end, step in committed if end <= length), default=0)
        for i, disk in enumerate(disks(log[:length], tries=tries)):
            clear(disk)  # the next life begins
            by_name = steps(disk)
            opened, _ = newest(disk)
            step = opened.manifest.step if opened is not None else 0
            if step < promised:
                wrong.append(
                    f"after {length} operations, disk {i}: step {promised} was committed, {step} is found"
                )
            elif opened is not None and not is_equal(opened, state(step)):
                wrong.append(
                    f"after {length} operations, disk {i}: step {step} holds something else"
                )
            elif step and step != by_name[0]:
                wrong.append(
                    f"after {length} operations, disk {i}: step {by_name[0]} is there by name, but damaged"
                )
    return wrong


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddp_kit.checkpoint.format.reader.PAUSE_S", 0.0)


def test_a_disk_syncs_what_the_rules_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file before `write` returns, through the page cache or not, and folders when asked."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    disk = LocalDisk(tmp_path)
    contents = [
        memoryview(bytes(10)),
        memoryview(bytes(CHUNK + 10)),
        memoryview(mmap.mmap(-1, CHUNK + 10)),
    ]  # the last one on a page
    for i, content in enumerate(contents):
        disk.write(f"folder/{i}", content)
        assert synced.pop() == (tmp_path / "folder" / str(i)).stat().st_ino
        assert (tmp_path / "folder" / str(i)).read_bytes() == content
    for folder in ("folder", ""):
        disk.sync(folder)
        assert synced.pop() == (tmp_path / folder).stat().st_ino
    assert not synced


@pytest.mark.parametrize("again", [False, True])
def test_no_moment_of_a_save_is_a_wrong_one_for_a_power_loss(again: bool) -> None:
    log, committed = recorded(again=again)
    assert len(log) > 60
    assert faults(log, committed, tries=8) == []


@pytest.mark.parametrize("without", ["fsync of a file", "sync of the folder", "sync of the parent"])
def test_a_forgotten_sync_shows(without: str) -> None:
    log, committed = recorded(without)
    assert faults(log, committed, tries=8)
