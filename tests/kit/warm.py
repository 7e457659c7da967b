"""Commands of ours as a shell would start them, in processes forked from one that has imported torch: 0.2 s of a core in place of 4 s.

What a new interpreter would add is left out: that modules are found, and how long it takes.
"""

import faulthandler
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from ddp_kit.launch.environment import RANK_VARIABLES
from ddp_kit.launch.local import processes
from ddp_kit.testing import Ranks, start_ranks
from ddp_kit.testing.rank import STACKS

LIMIT_S = 60.0
POLL_S = 0.02
TRAIN = "ddp_kit.train"
LAUNCHER = "ddp_kit.launch.local.run"
# as `python` ends when it cannot write what was left to write
NOT_FLUSHED = 120


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a shell gives a command: where its output goes ("" closes it), whether `nohup` stands before it, and, for a launcher, how long
    it waits for the peers of a failed rank, and then once more for those that it has told to end."""

    stdout: str
    stderr: str
    nohup: bool = False
    patience_s: float | None = None


class Forked:
    """What the launcher uses of `subprocess.Popen`, for ranks: a child of this process instead of a new interpreter."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int | None,
        pass_fds: Sequence[int],
        start_new_session: bool,
        preexec_fn: Callable[[], None] | None,
    ):
        assert command[1:3] == ["-m", TRAIN]
        assert start_new_session
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            os.setsid()
            if preexec_fn:
                preexec_fn()
            if stdin == subprocess.DEVNULL:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            _close_all_but({0, 1, 2, *pass_fds})
            os.environ.clear()
            os.environ.update(env)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            _run(TRAIN, command[3:])
        finally:
            os._exit(1)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *error: object) -> None:
        while self.poll() is None:
            time.sleep(POLL_S)


def _close_all_but(kept: set[int]) -> None:
    """As a new program has only what it was handed."""
    faulthandler.unregister(STACKS)
    faulthandler.disable()
    for path in list(Path("/proc/self/fd").iterdir()):
        descriptor = int(path.name)
        if descriptor not in kept:
            try:
                os.close(descriptor)
            except OSError:
                # the one of the listing
                continue


def _as_a_program(surroundings: Surroundings) -> None:
    """Signals, warnings and streams as a new program finds them."""
    warnings.resetwarnings()
    warnings.simplefilter("default")
    for number in processes.SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if surroundings.nohup:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for descriptor, place in ((1, surroundings.stdout), (2, surroundings.stderr)):
        if place:
            opened = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOCTTY)
            os.dup2(opened, descriptor)
            os.close(opened)
        else:
            os.close(descriptor)
    if not surroundings.stdout:
        sys.stdout = sys.__stdout__ = None  # type: ignore[misc,assignment]  # as Python has it
    if not surroundings.stderr:
        sys.stderr = sys.__stderr__ = None  # type: ignore[misc,assignment]  # as Python has it


def _run(module: str, words: Sequence[str]) -> NoReturn:
    """Runs a module's `main` and ends this process as the interpreter would."""
    try:
        code = import_module(module).main(words)
    except SystemExit as end:
        code = end.code
    except Exception:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream:
                stream.flush()
        except OSError:
            code = NOT_FLUSHED
    os._exit(code or 0)


def _program(module: str, words: Sequence[str], surroundings: Surroundings) -> NoReturn:
    _as_a_program(surroundings)
    for name in RANK_VARIABLES:
        os.environ.pop(name, None)
    if surroundings.patience_s is not None:
        processes.PEERS_S = processes.TERM_S = surroundings.patience_s
    # the launcher's alone: ranks may start what they like
    processes.subprocess = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL)  # type: ignore[assignment]
    _run(module, words)


class Started:
    """A command that runs, and what it says."""

    def __init__(self, ranks: Ranks, output: Path):
        self.running = ranks
        self.pid = ranks.pids[0]
        self.file = output

    @property
    def output(self) -> str:
        """What it has said so far."""
        return self.file.read_text() if self.file.exists() else ""

    @property
    def children(self) -> list[int]:
        """Process ids of a launcher's ranks."""
        found = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in found.read_text().split()] if found.exists() else []

    def send(self, number: int) -> None:
        """Sends it a signal."""
        self.running.kill(0, number)

    def until(self, is_so: Callable[[], object]) -> None:
        """Waits for something. Fails the test with what was said if it has ended, or has not done it in time."""
        end = time.monotonic() + LIMIT_S
        while not is_so():
            self.running.pool.receive(POLL_S)
            assert self.running.living, self.output
            assert time.monotonic() < end, self.output

    def says(self, text: str) -> None:
        """Waits until it has said something."""
        self.until(lambda: text in self.output)

    def ended(self) -> int:
        """Waits for its end. Returns: its exit code, negative for a signal."""
        (report,) = self.running.wait()
        assert report.outcome != "late", f"{report.stacks}\n{self.output}"
        return report.exit_code


@contextmanager
def started(
    module: str,
    *words: str,
    folder: Path,
    env: Mapping[str, str | None] | None = None,
    **surroundings: Any,
) -> Iterator[Started]:
    """`python -m MODULE WORDS...`, with the surroundings of a shell. At the end it is killed, and with it the ranks that it leaves."""
    output = folder / "output"
    given = Surroundings(**({"stdout": str(output), "stderr": str(output)} | surroundings))
    with start_ranks(
        _program, 1, module, list(words), given, group=False, env=env, deadline_s=LIMIT_S
    ) as ranks:
        run = Started(ranks, output)
        yield run
        for pid in run.children:
            os.kill(pid, signal.SIGKILL)
