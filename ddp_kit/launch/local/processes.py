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

from ddp_kit.io.cgroup import MemoryKills
from ddp_kit.io.logs import patient_output
from ddp_kit.io.polling import wait_until
from ddp_kit.launch.environment import environment, inside_job
from ddp_kit.launch.local.guard import Guard
from ddp_kit.launch.local.last_look import LastLook
from ddp_kit.launch.local.run_folder import RunFolder
from ddp_kit.launch.plan import Plan

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
# peers of a failed rank end within 10 s by themselves
PEERS_S = 15.0
# those of one that left because of a hang have been told so before
HUNG_S = 5.0
TERM_S = 10.0
# without a heartbeat of rank 0, which beats every 15 s, after an order to end
STILL_S = 60.0
ORDERS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
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
    memory = MemoryKills()
    with patient_output(), contextlib.ExitStack() as stack:
        folder = stack.enter_context(contextlib.closing(RunFolder()))
        guard = stack.enter_context(contextlib.closing(Guard()))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ranks = []
            for number in range(plan.processes):
                pipes = {"DDP_KIT_GUARD": guard.name}
                descriptors = [guard.descriptor]
                if number == 0:
                    pipes["DDP_KIT_LISTENER"] = str(listener.fileno())
                    pipes["DDP_KIT_RUN_FOLDER"] = folder.name
                    descriptors += [listener.fileno(), folder.descriptor]
                facts = _facts(plan, number, port=listener.getsockname()[1]) | pipes
                rank = _start(plan, number, facts=facts, descriptors=descriptors)
                ranks.append(stack.enter_context(rank))
        told = stack.enter_context(_forwarded(ranks))
        guard.watch([rank.pid for rank in ranks])
        first: tuple[int, int] = (0, 0)
        try:
            first = _watch(ranks, memory=memory, told=told, folder=folder)
        finally:
            _end(ranks)
            rank_number, code = first
            if code:
                ended_by = _ended_by(rank_number, code, memory=memory)
                # a full disk: the exit code says it all the same
                with contextlib.suppress(OSError):
                    folder.leave_last_word(rank_number, code, ended_by=ended_by)
        return code if code >= 0 else 128 - code


def _start(plan: Plan, rank: int, *, facts: Mapping[str, str], descriptors: Sequence[int]) -> Rank:
    return subprocess.Popen(
        plan.command,
        env=facts,
        stdin=None if rank == 0 else subprocess.DEVNULL,
        pass_fds=descriptors,
        # Ctrl-C reaches the launcher alone, which hands it on: twice would mean "leave at once"
        start_new_session=True,
        preexec_fn=_dies_with(os.getpid()),
    )


def _facts(plan: Plan, rank: int, *, port: int) -> dict[str, str]:
    """Returns a rank's environment."""
    return {
        **inside_job(environment()),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(plan.processes),
        "LOCAL_WORLD_SIZE": str(plan.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DDP_KIT_LAUNCHER": "ddp-kit run",
    }


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
def _forwarded(ranks: Sequence[Rank]) -> Iterator[list[float]]:
    """Hands signals on to every rank while it lasts.

    A SIGHUP that came ignored, as nohup has it, the ranks ignore too.

    Yields: when an order to end was handed on, by `time.monotonic()`.
    """
    told: list[float] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        if number in ORDERS:
            told.append(time.monotonic())
        for rank in ranks:
            rank.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(
    ranks: Sequence[Rank],
    *,
    memory: MemoryKills,
    told: Sequence[float] = (),
    folder: RunFolder | None = None,
) -> tuple[int, int]:
    """Waits for all ranks, after a failure not for long.

    Returns: the rank that failed first and its exit code, negative for a signal; (0, 0) if none
        has.
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
        elif told and folder is not None and _stands_still(told, folder):
            print(f"rank 0 does not answer, {STILL_S:.0f} s after a signal", file=sys.stderr)
            return 0, HUNG
        living = [number for number, rank in enumerate(ranks) if rank.returncode is None]
        if last_look.names_frozen(living):
            _kill(ranks)
            last_look.clear()
            return living[0], HUNG
        time.sleep(POLL_S)
    if HUNG in _failed(ranks).values():
        # whoever named the rank that hangs has also killed it, perhaps first
        _kill(ranks)
        return _first_with(HUNG, ranks), HUNG
    if not first:
        first = _failed(ranks)
    for number, code in first.items():
        # it could not say so itself, and its peers have failed after it, if only just
        if code < 0:
            print(_ended_by(number, code, memory=memory), file=sys.stderr, flush=True)
            return number, code
    return next(iter(first.items()), (0, 0))


def _first_with(code: int, ranks: Sequence[Rank]) -> int:
    """Returns the first rank that ended with an exit code."""
    return next(number for number, found in _failed(ranks).items() if found == code)


def _stands_still(told: Sequence[float], folder: RunFolder) -> bool:
    """Whether rank 0 was told to end and nothing of Python runs in it: not even its heart, a
    thread."""
    return min(time.monotonic() - told[0], folder.without_heartbeat_s()) > STILL_S


def _ended_by(rank: int, code: int, *, memory: MemoryKills) -> str:
    """Returns what ended a rank: a signal, or the kernel for want of memory, as it has counted."""
    if code >= 0:
        return f"rank {rank} ended with {code}"
    why = memory.words()
    if code == -signal.SIGKILL and why:
        return f"rank {rank} was killed by the kernel: {why}"
    return f"rank {rank} was ended by {signal.Signals(-code).name}"


def _have_ended(ranks: Sequence[Rank]) -> bool:
    """Whether no rank lives. Every one is asked: else one that has ended has no exit code."""
    codes = [rank.poll() for rank in ranks]
    return None not in codes


def _failed(ranks: Sequence[Rank]) -> dict[int, int]:
    """The exit codes of the ranks that are known to have failed, by rank."""
    return {number: rank.returncode for number, rank in enumerate(ranks) if rank.returncode}


def _kill(ranks: Sequence[Rank]) -> None:
    """Ends ranks that hang, or wait for one that does: nothing is saved by waiting for them."""
    left = [rank for rank in ranks if rank.poll() is None]
    for rank in left:
        rank.send_signal(signal.SIGKILL)
    wait_until(partial(_have_ended, left), within_s=TERM_S, pause_s=POLL_S)


def _end(ranks: Sequence[Rank]) -> None:
    """Ends the ranks that are left: they get time for a last save."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [rank for rank in ranks if rank.poll() is None]
        for rank in left:
            rank.send_signal(number)
        wait_until(partial(_have_ended, left), within_s=TERM_S, pause_s=POLL_S)
