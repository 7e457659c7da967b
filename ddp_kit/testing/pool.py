"""The warm server that ranks come from, seen from the pytest process.

Nothing of it outlives the pytest process. How long ranks may live is decided in `ranks`, what
happens inside one in `rank`.
"""

import json
import os
import pickle
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from ddp_kit.testing.job import Files, Job, environment_for_ranks

# torch._dynamo is what an optimizer's constructor imports, and takes longer than torch itself.
IMPORTED_ONCE = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch._dynamo",
    "ddp_kit.distributed.process_group",
    "ddp_kit.distributed.collectives",
)
START_S = 300.0  # importing torch from a cold disk
BOOT = (
    "import json, sys; a = json.loads(sys.argv[1]); sys.path[:] = a.pop('path'); "
    "from ddp_kit.testing.server import serve; serve(**a)"
)


class Pool:
    """A server that has imported torch, and the connection to it.

    It starts on first use, and again if it was killed.
    """

    current: ContextVar["Pool"] = ContextVar("pool")

    def __init__(self, *, imports: Sequence[str] = IMPORTED_ONCE) -> None:
        self.imports = list(imports)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def is_alive(self) -> bool:
        """Whether there is a server."""
        return self.process is not None and self.process.poll() is None

    def warm_up(self) -> None:
        """Starts the server without waiting for it."""
        if self.is_alive:
            return
        self.close()
        self.folder = Path(tempfile.mkdtemp(prefix="ddp-kit-ranks-"))
        self.log = self.folder / "server.log"
        self.buffer = b""
        self.jobs = 0
        self.ended: dict[int, tuple[int, float]] = {}
        self.connection, theirs = socket.socketpair()
        arguments = {
            "path": sys.path,
            "connection": theirs.fileno(),
            "folder": str(self.folder),
            "imports": self.imports,
            "parent": os.getpid(),
        }
        with theirs, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", BOOT, json.dumps(arguments)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment_for_ranks({"OMP_NUM_THREADS": "1"}),
                # Ctrl-C is pytest's; the server sees the connection close.
                start_new_session=True,
            )

    def fork(self, job: Job) -> tuple[Files, list[int]]:
        """Starts the ranks of a job. Returns their files and pids.

        Raises: TimeoutError if the server does not start; RuntimeError if it has ended.
        """
        self.warm_up()
        self.jobs += 1
        files = Files(self.folder / str(self.jobs))
        files.folder.mkdir()
        files.job.write_bytes(pickle.dumps(job))
        self._send({"job": str(files.folder), "world_size": job.world_size})
        pids = self._pids()
        for pid in pids:
            self.ended.pop(pid, None)  # of an earlier process: numbers come again
        return files, pids

    def _pids(self) -> list[int]:
        """Waits for the server's answer to a job."""
        end = time.monotonic() + START_S
        while True:
            reply = self.receive(end - time.monotonic())
            if reply is None:
                raise TimeoutError(
                    f"the server of ranks did not start within {START_S:g} s:\n{self._log()}"
                )
            if "pids" in reply:
                pids: list[int] = reply["pids"]
                return pids

    def signal(self, pid: int, number: int) -> None:
        """Sends a signal to a rank; SIGKILL takes its children too.

        The server does it, which knows whether the pid is still the rank's.
        Raises: RuntimeError if the server has ended.
        """
        self._send({"pid": pid, "signal": int(number)})

    def receive(self, timeout_s: float) -> dict[str, Any] | None:
        """Returns the server's next message, None if there is none in time.

        The ends of ranks are noted in `ended`. Raises: RuntimeError if the server has ended.
        """
        while b"\n" not in self.buffer:
            if not select.select([self.connection], [], [], max(timeout_s, 0))[0]:
                return None
            data = b""
            with suppress(ConnectionResetError):
                data = self.connection.recv(65536)
            if not data:
                raise RuntimeError(self._obituary())
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "ended" in message:
            self.ended[message["ended"]] = message["code"], message["time"]
        return message

    def close(self) -> None:
        """Ends the server and what is left of its ranks."""
        if self.process is None:
            return
        self.connection.close()
        # Without a job it may still import torch, deaf to the connection.
        if not self.jobs:
            self.process.kill()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.process = None

    def _send(self, message: Mapping[str, object]) -> None:
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError) as error:
            raise RuntimeError(self._obituary()) from error

    def _obituary(self) -> str:
        code = self.process.wait(10) if self.process else None
        ended = f"the server of ranks has ended (exit code {code}), and its ranks with it"
        return f"{ended}:\n{self._log()}"

    def _log(self) -> str:
        if not self.log.exists():
            return "(its log is gone)"
        return self.log.read_text(errors="replace")[-4000:]
