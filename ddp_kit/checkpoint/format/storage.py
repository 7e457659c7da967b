"""Where checkpoints live: the `Storage` seam, on local or shared disks and in memory.

What its operations promise after a power loss: a file is durable once `write` has returned *and*
its folder was synced; a rename once its parent was.
"""

import errno
import io
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, final

import numpy as np

from ddp_kit.io.atomic import sync

PAGE = 4096
# Bytes in one write: large enough to keep a disk busy, small enough to notice an error soon.
CHUNK = 16 << 20
NO_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP}  # tmpfs, some network file systems


class Storage(Protocol):
    """File operations by path, relative to one root. Errors are the system's own OSError."""

    def write(self, path: str, content: memoryview) -> None:
        """Creates a file (its folder too), writes it whole and makes its content durable. Raises:
        FileExistsError if it is there.
        """

    def open(self, path: str) -> BinaryIO:
        """Opens a file for reading."""

    def list(self, folder: str) -> list[str]:
        """Returns the names in a folder, sorted; none if it is not there."""

    def sync(self, folder: str) -> None:
        """Makes the names in a folder durable."""

    def rename(self, old: str, new: str) -> None:
        """Renames a folder. Raises: OSError if `new` is there and not empty."""

    def remove(self, path: str) -> None:
        """Removes a file or a folder with what is in it, if it is there."""


@final
@dataclass(frozen=True)
class LocalDisk:
    """A folder of this machine or of a shared file system. Large files bypass the page cache where
    the file system allows it: copying through it would take the CPU from training, and flushing it
    would stall.
    """

    root: Path

    def write(self, path: str, content: memoryview) -> None:
        """See Storage. `content` that starts on a page boundary is written with O_DIRECT."""
        target = self.root / path
        if target.parent.is_symlink():
            raise OSError(
                errno.ELOOP,
                "a link may lead elsewhere: nothing is written through it",
                str(target.parent),
            )
        if not target.parent.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
        with _created(target, direct=_is_direct(content)) as (file, is_direct):
            whole = len(content)
            if is_direct:
                whole = len(content) // PAGE * PAGE
            _write_all(file, content[:whole])
            # The tail fills no page.
            if whole < len(content):
                _write_all(file, memoryview(_page(content[whole:])))
                os.ftruncate(file, len(content))
            os.fsync(file)

    def open(self, path: str) -> BinaryIO:
        """See Storage."""
        # A pipe would wait for ever.
        if not (self.root / path).is_file():
            raise FileNotFoundError(errno.ENOENT, "no regular file", path)
        return (self.root / path).open("rb", buffering=0)

    def list(self, folder: str) -> list[str]:
        """See Storage."""
        try:
            return sorted(path.name for path in (self.root / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sync(self, folder: str) -> None:
        """See Storage."""
        sync(self.root / folder)

    def rename(self, old: str, new: str) -> None:
        """See Storage."""
        (self.root / old).rename(self.root / new)

    def remove(self, path: str) -> None:
        """See Storage."""
        target = self.root / path
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


def _is_direct(content: memoryview) -> bool:
    """Whether content is worth bypassing the page cache, and lies in memory as O_DIRECT asks."""
    return len(content) >= CHUNK and np.frombuffer(content, dtype=np.uint8).ctypes.data % PAGE == 0


@contextmanager
def _created(target: Path, *, direct: bool) -> Iterator[tuple[int, bool]]:
    """Opens a new file; yields its descriptor and whether it bypasses the page cache."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    is_direct = direct and hasattr(os, "O_DIRECT")
    try:
        file = os.open(target, flags | os.O_DIRECT if is_direct else flags, 0o644)
    except OSError as error:
        if not is_direct or error.errno not in NO_DIRECT:
            raise
        # Some file systems create the file and then refuse the flag.
        target.unlink(missing_ok=True)
        file = os.open(target, flags, 0o644)
        is_direct = False
    try:
        yield file, is_direct
    finally:
        os.close(file)


def _write_all(file: int, content: memoryview) -> None:
    while content:
        written = os.write(file, content[:CHUNK])
        content = content[written:]


def _page(tail: memoryview) -> memoryview:
    """Returns the tail of a file in a page of its own, aligned as O_DIRECT wants it."""
    # Begins on a page boundary.
    page = mmap.mmap(-1, PAGE)
    page[: len(tail)] = tail
    return memoryview(page)


@final
class Memory:
    """Storage in memory, for tests."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def write(self, path: str, content: memoryview) -> None:
        """See Storage."""
        if path in self.files:
            raise FileExistsError(errno.EEXIST, "exists", path)
        self.files[path] = bytes(content)

    def open(self, path: str) -> BinaryIO:
        """See Storage."""
        if path not in self.files:
            raise FileNotFoundError(errno.ENOENT, "no such file", path)
        return io.BytesIO(self.files[path])

    def list(self, folder: str) -> list[str]:
        """See Storage."""
        prefix = f"{folder}/" if folder else ""
        inside = [path.removeprefix(prefix) for path in self.files if path.startswith(prefix)]
        return sorted({path.split("/")[0] for path in inside})

    def sync(self, folder: str) -> None:
        """Nothing is lost here but all of it."""

    def rename(self, old: str, new: str) -> None:
        """See Storage."""
        if self.list(new):
            raise OSError(errno.ENOTEMPTY, "not empty", new)
        files = {}
        for path, content in self.files.items():
            if path.startswith(f"{old}/"):
                files[new + path.removeprefix(old)] = content
            else:
                files[path] = content
        self.files = files

    def remove(self, path: str) -> None:
        """See Storage."""
        self.files = {
            name: content
            for name, content in self.files.items()
            if name != path and not name.startswith(f"{path}/")
        }
