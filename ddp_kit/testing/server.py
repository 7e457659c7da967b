"""The process that ranks are forked from: it has imported torch once and has run no operator.

Owns: forking ranks, signalling and reaping them, and its own end: when pytest is gone, so are the ranks, the server and its folder.
Refuses: threads and tensor operations, because autograd's and OpenMP's threads do not survive a fork.
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

    Args: `connection` is a socket's file descriptor, `folder` what to delete at the end, `imports` the modules to import once.
    """
    with contextlib.suppress(AttributeError, PermissionError):  # Linux only; the ranks inherit it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    server = None
    try:
        for module in imports:
            importlib.import_module(module)
        config = pytest_parts.small_config()
        gc.collect()
        gc.freeze()  # a collection in a rank would write to, and so copy, every page it shares with the server
        server = _Server(socket.socket(fileno=connection), config=config, parent=parent)
        server.run()
    except BaseException:
        traceback.print_exc()
    finally:
        if server is not None:
            server.kill_all()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)  # no interpreter shutdown: nothing here is worth its time


class _Server:
    """The ranks that live, by pid, and the two sources of events: requests and ended ranks."""

    def __init__(self, connection: socket.socket, *, config: pytest.Config, parent: int) -> None:
        self.connection, self.config, self.parent = connection, config, parent
        self.living: set[int] = set()
        self.wake, wakeup = os.pipe()  # signal.set_wakeup_fd writes to it when a rank ends
        os.set_blocking(wakeup, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakeup)

    def run(self) -> None:
        buffer = b""
        while (
            os.getppid() == self.parent
        ):  # the connection alone may be kept open by a process that pytest has forked
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
            pids = [
                self.fork(Path(str(request["job"])), rank=number)
                for number in range(int(request["world_size"]))
            ]
            self.send({"pids": pids})
        elif (
            request["pid"] in self.living
        ):  # a pid that has ended may belong to someone else by now
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
            os._exit(1)  # must never go on as a second server

    def reap(self) -> None:
        for pid in sorted(self.living):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.living.remove(pid)
                self.send(
                    {
                        "ended": pid,
                        "code": os.waitstatus_to_exitcode(status),
                        "time": time.monotonic(),
                    }
                )
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)  # what the rank has left behind

    def send(self, message: dict[str, object]) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def kill_all(self) -> None:
        for pid in self.living:
            _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    if number == signal.SIGKILL:
        with contextlib.suppress(ProcessLookupError):  # not the leader of its group yet
            os.killpg(pid, number)
    os.kill(pid, number)  # not reaped yet, so the pid is still the rank's
