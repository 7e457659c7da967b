"""The run directory: whose it is while a run lives, and writing its small files whole.

Only rank 0 opens it; the others are told the path. Its lock has a heartbeat, by which another host
sees that the owner lives.
"""

import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from ddp_kit.distributed.topology import environment
from ddp_kit.errors import ConfigError
from ddp_kit.io.atomic import make_private_folder, write_text
from ddp_kit.io.json_lines import NOT_JSON, json_text, read_json
from ddp_kit.io.lock import exclusive
from ddp_kit.io.polling import wait_until
from ddp_kit.io.process import pid_namespace, process_start
from ddp_kit.lifecycle.history import restart_count, whole_name_of_job
from ddp_kit.lifecycle.status import Status, StatusFile, status_content

BEAT_S = 15.0
DEATH_S = 2.0  # from the loss of a killed process's connections to its end
STALE_S = 60.0  # without a beat, where the owner cannot be looked up: it ran on another host


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a run directory: enough to find out whether that very process still lives."""

    host: str
    pid: int
    start: str  # the process's start time as its system tells it: a reused pid has another one
    namespace: str  # containers may share a host's name, but not its pids
    job: str  # and its cluster, as in "17@name"
    restart: int  # of that job


class RunDir:
    """A run's directory, opened by rank 0 only. Between `claim` and `release` no other run can
    claim it.
    """

    def __init__(self, path: Path) -> None:
        """`path` need not exist. Nothing is touched before `claim`."""
        self.path = path
        self._lock = path / "run.lock"
        self._owner: Owner | None = None
        self._status = StatusFile(path / "status.json")
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def claim(self) -> None:
        """Makes the directory, takes its lock and keeps it fresh from a thread.

        After the loss of a node, agents of the same job may start the ranks again before the lock
        of a rank 0 on the lost one is stale: that is waited for.

        Raises: ConfigError if the directory cannot be written or is in use by a live run.
        """
        try:
            make_private_folder(self.path)
            wait_until(
                lambda: not _is_lost_peer(self.holder()),
                within_s=STALE_S + BEAT_S,
                pause_s=1.0,
            )
            self._take_lock()
            # Of an attempt that is over.
            (self.path / "requeue").unlink(missing_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--run-dir {self.path}: cannot be written ({error.strerror}). Type another "
                "--run-dir."
            ) from error
        self._status.open()
        self._stop.clear()
        self._heart = threading.Thread(target=self._beat, name="run-dir-heartbeat", daemon=True)
        self._heart.start()

    def ask_requeue(self, reason: str) -> None:
        """Leaves the file `requeue`: the launcher's batch script starts the job again if it is
        there at the end.
        """
        # A warning may come before there is anything else.
        make_private_folder(self.path)
        (self.path / "requeue").write_text(f"{' '.join(reason.split())}\n", encoding="utf-8")

    def release(self) -> None:
        """Ends the heartbeat and gives the lock up. Does nothing if the lock is not held."""
        if self._heart is None:
            return
        self._stop.set()
        self._heart.join()
        self._heart = None
        self._status.close()
        with exclusive(self._lock) as file:
            if _read_owner(file) in (self._owner, None):
                self._lock.unlink()
        self._owner = None

    def earlier(self) -> dict[str, object]:
        """Returns the status that an earlier attempt left, {} if none did what could be lost."""
        status = read_json(self.path / "status.json")
        never_began = status.get("status") == "failed" and status.get("step") == 0
        if never_began and not (self.path / "checkpoints").is_dir():
            return {}
        return status

    @contextlib.contextmanager
    def inherited(self) -> Iterator[bool]:
        """Holds the lock of an owner that has just died, and removes it at the end. Yields whether
        it was there for this process.
        """
        wait_until(lambda: not is_in_use(self.path), within_s=DEATH_S, pause_s=0.05)
        if not self._lock.exists():
            yield False
            return
        with exclusive(self._lock) as file:
            owner = _read_owner(file)
            is_heir = owner is not None and not _lives(owner, lock=self._lock)
            yield is_heir
            if is_heir or owner is None:
                self._lock.unlink()

    def write_json(self, name: str, value: object) -> None:
        """Writes a JSON file so that a reader finds the old or the new content whole, whenever this
        process dies.
        """
        write_text(self.path / name, json_text(value, indent=2) + "\n", durable=True)

    def status(
        self,
        status: Status,
        *,
        reason: str = "",
        step: int = 0,
        epoch: int = 0,
        metrics: Mapping[str, object] | None = None,
        weights_sha256: str = "",
        exit_code: int | None = None,
    ) -> dict[str, object]:
        """Writes status.json. Returns: its content, which trackers get at the end. `exit_code` is
        None while running.
        """
        content = status_content(
            status,
            reason=reason,
            step=step,
            epoch=epoch,
            metrics=metrics,
            weights_sha256=weights_sha256,
            exit_code=exit_code,
        )
        self.leave_status(content)
        return content

    def leave_status(self, content: Mapping[str, object]) -> None:
        """Writes status.json, of a content that is made. Raises: OSError if it cannot be."""
        self._status.write(content)

    @property
    def is_running(self) -> bool:
        """Whether this attempt has begun, and its end is not written down yet."""
        return self._status.is_running

    def tell_progress(self, progress: Callable[[], tuple[int, int]]) -> None:
        """From now on status.json has, at each heartbeat, the step and epoch that `progress`
        returns, until another status is written.
        """
        self._status.follow(progress)

    def holder(self) -> Owner | None:
        """Returns whose lock is in force, None if it is nobody's. Takes nothing."""
        with contextlib.suppress(FileNotFoundError), self._lock.open(encoding="utf-8") as file:
            owner = _read_owner(file)
            if owner is not None and _lives(owner, lock=self._lock):
                return owner
        return None

    def _take_lock(self) -> None:
        with exclusive(self._lock) as file:
            owner = _read_owner(file)
            if owner is not None and _lives(owner, lock=self._lock):
                job = f", job {owner.job}" if owner.job else ""
                raise ConfigError(
                    f"--run-dir {self.path}: in use by a live run: host {owner.host}, "
                    f"pid {owner.pid}{job}. Type another --run-dir, or end that run first."
                )
            self._owner = _this_process()
            file.seek(0)
            file.truncate()
            file.write(json_text(asdict(self._owner)) + "\n")
            file.flush()

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            # A file server that is away for a while; the next beat tries again.
            with contextlib.suppress(OSError):
                os.utime(self._lock)
                self._status.beat()


def is_in_use(path: Path) -> bool:
    """Returns whether a live run holds the directory. Changes nothing; anyone may ask."""
    return RunDir(path).holder() is not None


def _read_owner(file: IO[str]) -> Owner | None:
    """Returns the owner in an open lock file; None if it is empty or not ours to understand."""
    file.seek(0)
    try:
        found = json.loads(file.read())
        return Owner(**{name: kind(found[name]) for name, kind in Owner.__annotations__.items()})
    except (*NOT_JSON, KeyError, TypeError, OverflowError):
        return None


def _this_process() -> Owner:
    pid = os.getpid()
    job = whole_name_of_job()
    return Owner(
        host=socket.gethostname(),
        pid=pid,
        start=process_start(pid),
        namespace=pid_namespace(),
        job=job,
        restart=restart_count(),
    )


def _lives(owner: Owner, *, lock: Path) -> bool:
    """Whether the process that holds a lock is alive, as far as can be told from here."""
    if owner.job and owner.job == whole_name_of_job() and owner.restart < restart_count():
        # SLURM starts a job again only once its last attempt is over.
        return False
    if (owner.host, owner.namespace) == (socket.gethostname(), pid_namespace()):
        return process_start(owner.pid) == owner.start
    now = time.time()
    # The file server's clock dates the beats. A reader may not write here, and takes its own.
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=lock.parent) as clock:
        now = os.fstat(clock.fileno()).st_mtime
    return now - lock.stat().st_mtime < STALE_S


def _is_lost_peer(owner: Owner | None) -> bool:
    """Whether the owner was a rank of this very attempt of the job, on another node, and torchrun's
    agents have begun anew since.
    """
    if owner is None or not owner.job:
        return False
    if environment().get("TORCHELASTIC_MAX_RESTARTS", "0") in ("", "0"):
        return False
    here = _this_process()
    is_same_attempt = owner.job == here.job and owner.restart == here.restart
    return is_same_attempt and owner.host != here.host
