"""How a run ends that hangs: the verdict said once, stacks and status written, every rank gone.

The main thread is of no use here: it hangs. Whatever touches a disk may hang as well, so each such
piece of work has a thread and a time of its own.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ddp_kit.distributed.pulse import Pulse
from ddp_kit.io.logs import logger, without_secrets
from ddp_kit.io.polling import wait_until
from ddp_kit.io.process import process_state
from ddp_kit.watchdog import stacks
from ddp_kit.watchdog.board import Board

HUNG = 124
DISK_S = 4.0
# For the others to have done what they have to do.
OTHERS_S = 5.0
POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A rank that cannot end itself."""

    rank: int
    host: tuple[str, str]
    pid: int
    stack_file: int = -1


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """A verdict as all ranks get it: who says it, on whom, and who cannot hear it."""

    text: str
    speaker: int
    culprit: int = -1
    frozen: Sequence[Frozen] = field(default_factory=tuple)
    # The rank of each host that ends the frozen ones there: [host, namespace, rank].
    helpers: Sequence[tuple[str, str, int]] = field(default_factory=tuple)

    def written(self) -> str:
        """Returns it as it travels."""
        values = vars(self) | {"frozen": [vars(each) for each in self.frozen]}
        return json.dumps(values)


def read_sentence(text: str) -> Sentence:
    """Returns a sentence that has travelled."""
    values = json.loads(text)
    frozen = []
    for each in values["frozen"]:
        each["host"] = tuple(each["host"])
        frozen.append(Frozen(**each))
    values["frozen"] = tuple(frozen)
    values["helpers"] = tuple(tuple(each) for each in values["helpers"])
    return Sentence(**values)


def leave(
    sentence: Sentence, *, rank: int, world_size: int, pulse: Pulse, board: Board | None
) -> None:
    """Ends this process, and those of this host that cannot end themselves. Does not return.

    Each rank that can does it, from its watchdog's thread.
    """
    if sentence.speaker == rank:
        _say(sentence.text)
    own_frozen = _own_frozen(sentence, rank=rank)
    folder = pulse.stacks
    if folder is not None:
        _within(DISK_S, lambda: _write_stacks(folder, rank, own_frozen))
    frozen_ranks = {each.rank for each in sentence.frozen}
    # The one that has the run directory, or else the one that speaks.
    writer = sentence.speaker if 0 in frozen_ranks else 0
    if writer == rank:
        if 0 in frozen_ranks:
            _kill(own_frozen)
        write = pulse.on_verdict
        if write is not None:
            _within(DISK_S, lambda: write(sentence.text, sentence.culprit))
    _within(POLL_S * 4, lambda: logger.error("%s", sentence.text))
    if board is not None:
        _await_others(board, expected=set(range(world_size)) - frozen_ranks)
    _kill(own_frozen)
    os._exit(HUNG)


def _say(text: str) -> None:
    """Writes to stderr past Python's own stream, whose lock the main thread may hold."""
    line = f"{without_secrets(text)}\n".encode(errors="replace")
    _within(1.0, lambda: os.write(2, line))


def _own_frozen(sentence: Sentence, *, rank: int) -> list[Frozen]:
    """Returns the frozen ranks that this one has to end."""
    hosts = {(host, namespace) for host, namespace, helper in sentence.helpers if helper == rank}
    return [each for each in sentence.frozen if each.host in hosts]


def _write_stacks(folder: Path, rank: int, frozen: Sequence[Frozen]) -> None:
    stacks.write_own(folder / f"rank-{rank}.txt")
    for each in frozen:
        text = stacks.fetch(each.pid, each.stack_file)
        if not text:
            state = process_state(each.pid)
            text = f"pid {each.pid} gives no stacks: the state of its process is {state or '?'}\n"
        (folder / f"rank-{each.rank}.txt").write_text(text, encoding="utf-8")


def _kill(frozen: Sequence[Frozen]) -> None:
    for each in frozen:
        try:
            os.kill(each.pid, signal.SIGKILL)
        except OSError:
            # It has gone meanwhile.
            continue


def _await_others(board: Board, *, expected: set[int]) -> None:
    """Waits until the others have written down what they have to, or OTHERS_S are over: a rank
    that leaves before would make its peers take it for a lost one.
    """
    board.is_done = True

    def all_are_done() -> bool:
        board.ask()
        return board.is_gone or expected <= board.done

    wait_until(all_are_done, within_s=OTHERS_S, pause_s=POLL_S)


def _within(seconds: float, work: Callable[[], object]) -> None:
    """Does something that may hang, and goes on after some seconds whether it is done or not."""
    thread = threading.Thread(target=_tried, args=(work,), daemon=True)
    thread.start()
    thread.join(timeout=seconds)


def _tried(work: Callable[[], object]) -> None:
    try:
        work()
    except Exception as error:
        # A full disk, a closed terminal: the end must come all the same.
        os.write(2, f"at the end of a hang: {error!r}\n".encode(errors="replace"))


def claim_file(folder: Path, text: str) -> bool:
    """Claims a verdict where the store does not answer. Returns whether no other rank has."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / "verdict.txt").open("x", encoding="utf-8") as file:
            file.write(f"{text}\n")
    except FileExistsError:
        return False
    return True


def flush_streams() -> None:
    """Nothing that was printed is lost: `os._exit` flushes no streams."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def wait_for_end(seconds: float) -> None:
    """Keeps the main thread from saying that a peer is lost, while the run is being ended."""
    time.sleep(seconds)
