"""A memory cgroup with a limit, as root on a machine with version 1 or 2 of them; and a launcher that runs inside: `started("caged", ...)`."""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ddp_kit.io.cgroup import own_cgroup
from ddp_kit.launch.local import run

CAGE = "TEST_CAGE"
LIMITS = {1: "memory.limit_in_bytes", 2: "memory.max"}


@contextlib.contextmanager
def memory_cage(limit: int) -> Iterator[Path]:
    """Yields the folder of a new cgroup. Skips the test where none can be made."""
    own = own_cgroup("memory")
    if own is None:
        pytest.skip("no memory cgroup is mounted here")
    folder = own.folder / f"test-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir()
        (folder / LIMITS[own.version]).write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        pytest.skip(f"a memory cgroup with a limit cannot be made here, it takes root: {error}")
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """A killed process takes its time to leave."""
    end = time.monotonic() + 10
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def main(words: Sequence[str]) -> int:
    """`ddp-kit run` inside of the cgroup that the environment names."""
    (Path(os.environ[CAGE]) / "cgroup.procs").write_text(str(os.getpid()))
    return run.main(words)
