"""The process that ranks are forked from: it has imported torch once and has run no operator.

When pytest is gone, so are the ranks, the server and its folder. There are no threads and no tensor
operations here, because autograd's and OpenMP's threads do not survive a fork.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from ddp_kit.testing import pytest_parts
from ddp_kit.testing.rank import run_rank

POLL_S = 1.0


def serve(connection: int, folder: str, imports: Sequence[str], parent: int) -> NoReturn:
    """Forks ranks on request until the connection closes or the parent has died.

    Args: `connection` is a socket's file descriptor, `folder` what to delete at the end, `imports`
        the modules to import once, `parent` the pid of pytest.
    """
    # Linux has it only; the ranks inherit it.
    with contextlib.suppress(AttributeError, PermissionError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    server = None
    try:
        for module in imports:
            importlib.import_module(module)
        config = pytest_parts.small_config()
        gc.collect()
        # A collection in a rank would write to, and so copy, every page it shares with the server.
        gc.freeze()
        server = _Server(socket.socket(fileno=connection), config=config, parent=parent)
        server.run()
    except BaseException:
        traceback.print_exc()
    finally:
        if server is not None:
            server.kill_all()
        shutil.rmtree(folder, ignore_errors=True)
        # No interpreter shutdown: nothing here is worth its time.
        os._exit(0)


class _Server:
    """The ranks that live, by pid, and the two sources of events: requests and ended ranks."""

    def __init__(self, connection: socket.socket, *, config: pytest.Config, parent: int) -> None:
        self.connection = connection
        self.config = config
        self.parent = parent
        self.living: set[int] = set()
        self.wake, wakeup = os.pipe()  # signal.set_wakeup_fd writes to it when a rank ends
        os.set_blocking(wakeup, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup)

    def run(self) -> None:
        buffer = b""
        # The connection alone may be kept open by a process that pytest has forked.
        while os.getppid() == self.parent:
            sources: list[Any] = [self.connection, self.wake]
            ready, _, _ = select.select(sources, [], [], POLL_S)
            if self.wake in ready:
                os.read(self.wake, 4096)
                self.reap()
            if self.connection in ready:
                data = self.connection.recv(65536)
                if not data:
                    return
                *requests, buffer = (buffer + data).split(b"\n")
                for request in requests:
                    self.answer(json.loads(request))

    def answer(self, request: dict[str, str | int]) -> None:
        if "job" in request:
            job = Path(str(request["job"]))
            ranks = range(int(request["world_size"]))
            self.send({"pids": [self.fork(job, rank=rank) for rank in ranks]})
        # A pid that has ended may belong to someone else by now.
        elif request["pid"] in self.living:
            _signal(int(request["pid"]), int(request["signal"]))

    def fork(self, job: Path, *, rank: int) -> int:
        pid = os.fork()
        if pid:
            self.living.add(pid)
            return pid
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self.connection.close()
            run_rank(job, rank=rank, config=self.config)
        except BaseException:
            traceback.print_exc()
        finally:
            # It must never go on as a second server.
            os._exit(1)

    def reap(self) -> None:
        for pid in sorted(self.living):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            self.living.remove(pid)
            code = os.waitstatus_to_exitcode(status)
            self.send({"ended": pid, "code": code, "time": time.monotonic()})
            # What the rank has left behind.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def send(self, message: dict[str, object]) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def kill_all(self) -> None:
        for pid in self.living:
            _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    """Signals a rank that is not reaped yet, so that the pid is still the rank's."""
    if number == signal.SIGKILL:
        # It may not be the leader of its group yet.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)
    os.kill(pid, number)
