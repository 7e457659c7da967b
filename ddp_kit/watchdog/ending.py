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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.pulse import Phase
from ddp_kit.io.logs import logger, without_secrets
from ddp_kit.io.polling import wait_until
from ddp_kit.watchdog import stacks
from ddp_kit.watchdog.board import Board
from ddp_kit.watchdog.judge import Verdict
from ddp_kit.watchdog.news import Seen

HUNG = 124
DISK_S = 4.0
LOG_S = 0.5
LAST_S = 0.5
# Within which every rank is gone.
ENDING_S = 15.0
# For the others to have done what they have to do.
OTHERS_S = 5.0
POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A rank that cannot end itself."""

    rank: int
    host: tuple[str, str]
    pid: int
    stacks: str = ""


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


def sentence_of(
    verdict: Verdict,
    ranks: Sequence[Seen],
    *,
    speaker: int,
    folder: Path | None,
    fetched: Mapping[int, str],
) -> Sentence:
    """Returns a verdict for all ranks.

    Args: `speaker` the rank that came to it; `folder` for stacks; `fetched` those of ranks that
        cannot write their own.
    """
    text = verdict.text
    if folder is not None:
        text += f". Stacks: {folder}/"
    frozen = []
    helpers: dict[tuple[str, str], int] = {}
    for seen in sorted(ranks, key=lambda seen: seen.news.rank):
        news = seen.news
        if seen.is_stuck:
            found = fetched.get(news.rank, "")
            frozen.append(Frozen(rank=news.rank, host=seen.host, pid=news.pid, stacks=found))
        elif news.pid and not seen.is_frozen:
            helpers.setdefault(seen.host, news.rank)
    return Sentence(
        text=text,
        speaker=speaker,
        culprit=verdict.culprits[0] if verdict.culprits else -1,
        frozen=tuple(frozen),
        helpers=tuple((*host, rank) for host, rank in helpers.items()),
    )


def leave(sentence: Sentence, *, group: Group, board: Board | None) -> None:
    """Ends this process, and those of this host that cannot end themselves. Does not return.

    Each rank that can does it, from its watchdog's thread.
    """
    rank = group.rank
    pulse = group.pulse
    # Who wakes up now goes no further than to its next mark.
    setattr(pulse, "mark", _wait_for_end)  # noqa: B010 (a method of this one object)
    if sentence.speaker == rank:
        _say(sentence.text)
    own_frozen = _own_frozen(sentence, rank=rank)
    frozen_ranks = {each.rank for each in sentence.frozen}
    if group.store_rank in frozen_ranks:
        # It dies with that rank.
        board = None
    _within(LOG_S, _flush_streams)
    _hush()
    _kill(own_frozen)
    folder = pulse.stacks
    if folder is not None:
        _within(DISK_S, lambda: _write_stacks(folder, rank, own_frozen))
    # The one that has the run directory, or else the one that speaks.
    writer = sentence.speaker if 0 in frozen_ranks else 0
    write = pulse.on_verdict
    if writer == rank and write is not None:
        _within(DISK_S, lambda: write(sentence.text, sentence.culprit))
    if logger.handlers:
        _within(LOG_S, lambda: logger.debug("%s", sentence.text))
    if board is not None:
        _await_others(board, expected=set(range(group.world_size)) - frozen_ranks)
        if rank == group.store_rank:
            # The others have read that all are done before the store goes.
            time.sleep(LAST_S)
    os._exit(HUNG)


def _say(text: str) -> None:
    """Writes to stderr past Python's own stream, whose lock the main thread may hold."""
    line = f"{without_secrets(text)}\n".encode(errors="replace")
    _within(1.0, lambda: os.write(2, line))


def _hush() -> None:
    """Nothing is said any more: as a store dies that is being asked, torch writes C++ stacks."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def _own_frozen(sentence: Sentence, *, rank: int) -> list[Frozen]:
    """Returns the frozen ranks that this one has to end."""
    hosts = {(host, namespace) for host, namespace, helper in sentence.helpers if helper == rank}
    return [each for each in sentence.frozen if each.host in hosts]


def _write_stacks(folder: Path, rank: int, frozen: Sequence[Frozen]) -> None:
    stacks.write_own(folder / f"rank-{rank}.txt")
    for each in frozen:
        text = each.stacks or f"pid {each.pid} gave no stacks: it was stopped, or in the kernel\n"
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
        logger.debug("at the end of a hang: %r", error)


def claim_file(folder: Path, text: str) -> bool:
    """Claims a verdict where the store does not answer. Returns whether no other rank has."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (folder / "verdict.txt").open("x", encoding="utf-8") as file:
            file.write(f"{text}\n")
    except FileExistsError:
        return False
    return True


def _flush_streams() -> None:
    """Nothing that was printed is lost: `os._exit` flushes no streams."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def wait_for_end() -> None:
    """Keeps the main thread from going on, or from saying that a peer is lost, while the run is
    being ended.
    """
    time.sleep(ENDING_S)


def _wait_for_end(phase: Phase) -> None:
    wait_for_end()
