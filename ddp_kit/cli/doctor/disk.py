"""The disk of a run: can it write, rename and make durable, how fast, and how much has it room for.

Nothing stays there.
"""

import contextlib
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.retention import steps
from ddp_kit.io.atomic import sync
from ddp_kit.io.json_lines import read_json, read_lines
from ddp_kit.io.polling import wait_until

MIB = 2**20
CHUNK = 4 * MIB
# So long, or so many bytes, for the rate at which it writes.
WRITE_S = 0.5
MOST_WRITTEN = 64 * MIB
FSYNCS = 3
# Until another host sees a new file.
SEEN_S = 10.0
NEEDS = re.compile(r"a stop needs up to ([\d.]+) s")


def home_of(run_dir: str) -> Path:
    """Returns the folder to try: the run directory, or the nearest one above that is there."""
    path = Path(run_dir or ".").absolute()
    while not path.is_dir():
        path = path.parent
    return path


@contextmanager
def token(home: Path) -> Iterator[str]:
    """Yields the path of a file that other nodes look for, "" if it cannot be written."""
    path = home / f".ddp_kit_doctor-{uuid.uuid4().hex[:12]}"
    try:
        path.write_text(path.name)
    except OSError:
        yield ""
        return
    try:
        yield str(path)
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def sees(path: str) -> bool:
    """Whether this process sees another one's file, in the time that file servers take."""
    if not path:
        return False
    place = Path(path)
    return wait_until(
        lambda: place.exists() and place.read_text() == place.name, within_s=SEEN_S, pause_s=0.1
    )


def try_disk(home: Path) -> Mapping[str, object]:
    """Returns what came of writing there: `error` "" or what the system said, and the times."""
    about = os.statvfs(home)
    found: dict[str, object] = {"error": "", "free": about.f_bavail * about.f_frsize}
    path = home / f".ddp_kit_doctor-{uuid.uuid4().hex[:12]}.tmp"
    renamed = path.with_suffix(".renamed")
    try:
        found["fsync_s"] = min(_fsync_s(path) for _ in range(FSYNCS))
        path.rename(renamed)
        sync(home)
        if path.exists() or not renamed.exists():
            found["error"] = "a renamed file is still there under its old name"
        found["rate"] = _rate(renamed)
    except OSError as error:
        found["error"] = error.strerror or str(error)
    finally:
        for left in (path, renamed):
            with contextlib.suppress(OSError):
                left.unlink()
    return found


def _fsync_s(path: Path) -> float:
    with path.open("wb") as file:
        file.write(bytes(MIB))
        file.flush()
        begin = time.perf_counter()
        os.fsync(file.fileno())
        return time.perf_counter() - begin


def _rate(path: Path) -> float:
    """Bytes a second that it takes, made durable."""
    piece = os.urandom(CHUNK)
    written = 0
    begin = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        while written < MOST_WRITTEN and time.perf_counter() - begin < WRITE_S:
            written += file.write(piece)
        os.fsync(file.fileno())
    return written / (time.perf_counter() - begin)


def checkpoint_bytes(run_dir: str) -> int:
    """Returns the size of a run's newest checkpoint, 0 if it has none."""
    folder = Path(run_dir or ".") / "checkpoints"
    if not run_dir or not folder.is_dir():
        return 0
    found = steps(LocalDisk(folder))
    if not found:
        return 0
    files = (folder / f"step-{found[0]:08d}").iterdir()
    return sum(path.stat().st_size for path in files if path.is_file())


def keep_of_run(run_dir: str) -> int:
    """Returns how many checkpoints a run keeps, 0 if that is not known."""
    settings = read_json(Path(run_dir or ".") / "settings.json").get("settings")
    found = settings.get("keep") if isinstance(settings, dict) else None
    return found if isinstance(found, int) else 0


def stop_needs_s(run_dir: str) -> float:
    """Returns what a stop of a run was measured to need, 0 if that is not known."""
    needs_s = 0.0
    for event in read_lines(Path(run_dir or ".") / "events.jsonl"):
        words = NEEDS.search(str(event.get("message", "")))
        if event.get("event") == "grace" and words:
            needs_s = float(words[1])
    return needs_s
