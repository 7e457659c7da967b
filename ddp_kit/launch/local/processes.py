"""Our own launcher for one machine: it imports no torch, so that the ranks do not wait for it.

It keeps the ranks' processes from start to end, hands signals on to them, and ends with the exit
code of the one that failed first. It does not restart them: what is lost is since the newest
checkpoint, and the next command goes on from there.

The ranks' store is reached through a listener that is opened here and handed to rank 0: no other
process can take the port in between.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType

from ddp_kit.io.logs import patient_output
from ddp_kit.io.polling import wait_until
from ddp_kit.launch.environment import environment, inside_job
from ddp_kit.launch.local.last_look import LastLook
from ddp_kit.launch.plan import Plan

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
# peers of a failed rank end within 10 s by themselves
PEERS_S = 15.0
# those of one that left because of a hang have been told so before
HUNG_S = 5.0
TERM_S = 10.0
POLL_S = 0.02
USAGE = 2
HUNG = 124
# of prctl.h
PR_SET_PDEATHSIG = 1
Rank = subprocess.Popen[bytes]


def run(plan: Plan) -> int:
    """Starts the ranks and waits for their end.

    Returns: the exit code of the first rank that failed (128 + the signal), else 0.
    """
    with patient_output(), contextlib.ExitStack() as stack:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ranks = [
                stack.enter_context(_start(plan, rank, listener=listener))
                for rank in range(plan.processes)
            ]
        stack.enter_context(_forwarded(ranks))
        try:
            return _watch(ranks)
        finally:
            _end(ranks)


def _start(plan: Plan, rank: int, *, listener: socket.socket) -> Rank:
    handed_on = [listener.fileno()] if rank == 0 else []
    return subprocess.Popen(
        plan.command,
        env=_facts(plan, rank, listener=listener),
        stdin=None if rank == 0 else subprocess.DEVNULL,
        pass_fds=handed_on,
        # Ctrl-C reaches the launcher alone, which hands it on: twice would mean "leave at once"
        start_new_session=True,
        preexec_fn=_dies_with(os.getpid()),
    )


def _facts(plan: Plan, rank: int, *, listener: socket.socket) -> Mapping[str, str]:
    """Returns a rank's environment."""
    facts = {
        **inside_job(environment()),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(plan.processes),
        "LOCAL_WORLD_SIZE": str(plan.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listener.getsockname()[1]),
        "DDP_KIT_LAUNCHER": "ddp-kit run",
    }
    if rank == 0:
        facts["DDP_KIT_LISTENER"] = str(listener.fileno())
    return facts


def _dies_with(parent: int) -> Callable[[], None] | None:
    """Returns what a process does before it becomes a rank.

    It asks for a SIGTERM, which saves, when the launcher dies.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(143)

    return ask


@contextmanager
def _forwarded(ranks: Sequence[Rank]) -> Iterator[None]:
    """Hands signals on to every rank while it lasts.

    A SIGHUP that came ignored, as nohup has it, the ranks ignore too.
    """

    def hand_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            rank.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(ranks: Sequence[Rank]) -> int:
    """Waits for all ranks, after a failure not for long.

    Returns: the exit code of the rank that failed first, or 0.
    """
    end = float("inf")
    first: dict[int, int] = {}
    last_look = LastLook([rank.pid for rank in ranks])
    while not _have_ended(ranks) and time.monotonic() < end:
        if not first:
            first = _failed(ranks)
        if first:
            # what one rank refuses as usage all refuse, and the others would only say it again
            patience_s = 0.0 if USAGE in _failed(ranks).values() else PEERS_S
            if HUNG in _failed(ranks).values():
                patience_s = HUNG_S
            end = min(end, time.monotonic() + patience_s)
        living = [number for number, rank in enumerate(ranks) if rank.returncode is None]
        if last_look.names_frozen(living):
            _kill(ranks)
            last_look.clear()
            return HUNG
        time.sleep(POLL_S)
    if HUNG in _failed(ranks).values():
        # whoever named the rank that hangs has also killed it, perhaps first
        _kill(ranks)
        return HUNG
    if not first:
        first = _failed(ranks)
    for number, code in first.items():
        # it could not say so itself, and its peers have failed after it, if only just
        if code < 0:
            name = signal.Signals(-code).name
            print(f"rank {number} was ended by {name}", file=sys.stderr, flush=True)
            return 128 - code
    return next(iter(first.values()), 0)


def _have_ended(ranks: Sequence[Rank]) -> bool:
    """Whether no rank lives. Every one is asked: else one that has ended has no exit code."""
    codes = [rank.poll() for rank in ranks]
    return None not in codes


def _failed(ranks: Sequence[Rank]) -> dict[int, int]:
    """The exit codes of the ranks that are known to have failed, by rank."""
    return {number: rank.returncode for number, rank in enumerate(ranks) if rank.returncode}


def _kill(ranks: Sequence[Rank]) -> None:
    """Ends ranks that hang, or wait for one that does: nothing is saved by waiting for them."""
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
            rank.wait()


def _end(ranks: Sequence[Rank]) -> None:
    """Ends the ranks that are left: they get time for a last save."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [rank for rank in ranks if rank.poll() is None]
        for rank in left:
            rank.send_signal(number)
        wait_until(partial(_have_ended, left), within_s=TERM_S, pause_s=POLL_S)
