"""The watchdog of one rank: a thread that sees its own main thread stand still, looks where the
others are, and ends the run once it is known who hangs.

No clocks are compared, and pauses of a whole process are not counted: a job that was suspended
does not hang. What is counted are this thread's own ticks.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from ddp_kit.distributed.failures import is_lost_peer
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.pulse import Phase
from ddp_kit.io.process import pid_namespace
from ddp_kit.io.pulse_file import IDLE_MS, TICKS, fetch_stacks, no_file
from ddp_kit.watchdog import stacks
from ddp_kit.watchdog.board import Board
from ddp_kit.watchdog.ending import (
    Sentence,
    claim_file,
    leave,
    read_sentence,
    sentence_of,
    wait_for_end,
)
from ddp_kit.watchdog.judge import judge
from ddp_kit.watchdog.last_seen import last_seen, place_in_words
from ddp_kit.watchdog.news import News, Seen
from ddp_kit.watchdog.own_words import sequences_of, shared
from ddp_kit.watchdog.peers import Peers

TICK_S = 1.0
# Ticks without a word after which a rank says nothing any more, and seconds at least.
SILENT_TICKS = 5
SILENT_S = 2.0
# Without progress, until a rank wants to know what the others say.
CURIOUS_S = 5.0
# For a store that answers, and for the rest of the ending.
CLAIM_S = 2.0


def watch(group: Group) -> None:
    """Watches this rank's main thread until the group is left, if it has peers to wait for or a
    launcher that waits for it. Every rank calls it; more than once does nothing.
    """
    if group.is_watched or group.pg is None or not group.pulse.limits.is_on:
        return
    group.is_watched = True
    group.raise_timeouts(2 * group.pulse.limits.longest)
    watchdog = Watchdog(group)
    group.closing.callback(watchdog.close)
    group.failure_report.before = watchdog.main_failed
    group.failure_report.last_seen = watchdog.last_seen


class Watchdog:
    """The thread and what it knows. Whoever makes one closes it."""

    def __init__(self, group: Group):
        """Starts it; called on the main thread, which is the one that is watched."""
        self._group = group
        self._pulse = group.pulse
        self._main = threading.get_ident()
        self._host = socket.gethostname()
        self._namespace = pid_namespace()
        self._signal = stacks.StackSignal()
        self._signal.install()
        self._file = shared(self._pulse)
        self._peers = Peers((self._host, self._namespace))
        self._board: Board | None = None
        if group.store is not None:
            self._board = Board(group.store, rank=group.rank, world_size=group.world_size)
        self._tick_s = TICK_S
        limit = group.pulse.limits.step
        if limit:
            self._tick_s = min(TICK_S, limit / 10)
        self._idle_s = 0.0
        self._passed_s = 0.0
        self._failed_at = ""
        self._fetched: dict[int, str] = {}
        self._store_silent_s = 0.0
        self._last: tuple[int, dict[str, int]] = (-1, {})
        self._number = 0
        self._is_ending = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ddp_kit watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the watch."""
        self._over.set()
        if threading.get_ident() == self._main:
            self._thread.join(timeout=TICK_S)
        if self._board is not None:
            self._board.close()
        self._signal.remove()
        self._peers.close()
        if self._file is not None:
            self._pulse.numbers = no_file()
            self._file.close()

    def main_failed(self, error: BaseException) -> None:
        """Hears of an error on the main thread, before that asks whose fault it is.

        If it has lost a peer because the run is being ended, it is kept here until its own end.
        """
        idle_s = self._idle_s
        limit_s = self._pulse.limit_s
        self._failed_at = place_in_words(
            self._group.rank,
            phase=self._pulse.phase,
            step=self._pulse.step,
            line=stacks.users_line_of(error),
        )
        self._pulse.mark(Phase.END)
        if not is_lost_peer(error) or self._over.is_set():
            return
        if idle_s < limit_s / 2 and not self._is_ending:
            return
        end = time.monotonic() + CLAIM_S + SILENT_S
        while time.monotonic() < end:
            if self._is_ending or (self._board is not None and self._board.verdict):
                wait_for_end()
            time.sleep(self._tick_s / 2)

    def last_seen(self, gone: Sequence[int]) -> str:
        """Returns where ranks were that have died, as far as this one knows, and where it is
        itself; "" if nothing is known.
        """
        return last_seen(self._peers, gone, own=self._failed_at, folder=self._pulse.stacks)

    def _run(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self._tick_s):
            now = time.monotonic()
            # A longer pause is the whole process's, which was stopped, or has waited for a core.
            self._tick(min(now - before, 2 * self._tick_s))
            before = now

    def _tick(self, passed_s: float) -> None:
        board = self._board
        self._passed_s = passed_s
        marks = (self._pulse.marks, sequences_of(self._group))
        frame = stacks.main_frame(self._main)
        if marks != self._last or stacks.is_debugged(frame):
            self._idle_s = 0.0
        else:
            self._idle_s += passed_s
        self._last = marks
        self._number += 1
        self._write_numbers()
        self._group.raise_timeouts(2 * self._pulse.limit_s)
        own = self._own_news()
        if board is None:
            self._judge([Seen(news=own)])
            return
        if board.verdict:
            self._end(read_sentence(board.verdict))
        board.own = own.text()
        is_curious = self._idle_s >= min(CURIOUS_S, own.limit_s / 3)
        board.wants_all = is_curious or len(board.seen()) < self._group.world_size - 1
        for seen in board.seen().values():
            self._peers.meet(seen)
        self._store_silent_s = 0.0
        if board.waits_s > self._tick_s:
            self._store_silent_s = board.waits_s
        board.ask()
        if is_curious:
            self._judge(self._ranks(own))

    def _write_numbers(self) -> None:
        """Tells other processes of this host what they cannot know."""
        numbers = self._pulse.numbers
        numbers[TICKS] = self._number
        numbers[IDLE_MS] = int(1000 * self._idle_s)
        self._pulse.tell_limits()
        if self._file is not None and self._pulse.stacks is not None:
            self._file.name_folder(self._pulse.stacks)

    def _own_news(self) -> News:
        pulse = self._pulse
        line = ""
        is_waiting = False
        detail = ""
        if self._idle_s > 2 * self._tick_s:
            frame = stacks.main_frame(self._main)
            line = stacks.users_line(frame)
            is_waiting = stacks.waits_in_collective(frame)
            if pulse.waits_for is not None and pulse.phase in (Phase.DATA, Phase.EVALUATION):
                detail = pulse.waits_for()
        return News(
            rank=self._group.rank,
            host=self._host,
            pid=os.getpid(),
            namespace=self._namespace,
            number=self._number,
            phase=pulse.phase,
            step=pulse.step,
            part=pulse.part,
            idle_s=round(self._idle_s, 2),
            limit_s=pulse.limit_s,
            sequences=self._last[1],
            line=line,
            is_waiting=is_waiting,
            detail=detail,
            pulse_file=-1 if self._file is None else self._file.descriptor,
            stack_file=self._signal.descriptor,
        )

    def _ranks(self, own: News) -> list[Seen]:
        """Returns all ranks as far as they are known here."""
        board = self._board
        assert board is not None
        seen = board.seen()
        ranks = [Seen(news=own)]
        for rank in range(self._group.world_size):
            if rank == self._group.rank:
                continue
            ranks.append(self._as_known(rank, seen.get(rank)))
        return ranks

    def _as_known(self, rank: int, seen: Seen | None) -> Seen:
        if seen is None:
            # It was still before its first word.
            limit_s = self._pulse.limits.start
            return Seen(news=News(rank=rank, host="?", limit_s=limit_s), silent_s=self._idle_s)
        silent_s = seen.silent_s
        if rank == self._group.store_rank:
            silent_s = max(silent_s, self._store_silent_s)
        is_frozen = silent_s >= max(SILENT_S, SILENT_TICKS * self._tick_s)
        known = Seen(news=seen.news, silent_s=silent_s, is_frozen=is_frozen)
        return self._peers.look(known, passed_s=self._passed_s)

    def _judge(self, ranks: list[Seen]) -> None:
        """Ends the run if it is known who hangs."""
        verdict = judge(ranks)
        if verdict is None or self._over.is_set():
            return
        ranks = [self._with_line(seen) for seen in ranks]
        sentence = sentence_of(
            judge(ranks) or verdict,
            ranks,
            speaker=self._group.rank,
            folder=self._pulse.stacks,
            fetched=self._fetched,
        )
        board = self._board
        if board is not None and not board.is_gone:
            board.claim = sentence.written()
            end = time.monotonic() + CLAIM_S
            while not board.verdict and not board.is_gone and time.monotonic() < end:
                board.ask()
                time.sleep(self._tick_s / 10)
            if board.verdict:
                self._end(read_sentence(board.verdict))
        self._end_alone(sentence, ranks)

    def _with_line(self, seen: Seen) -> Seen:
        """Returns a rank that cannot speak with the line of its stacks, if it is on this host and
        gives some.
        """
        if not seen.is_stuck or seen.state in ("", "T", "t", "D"):
            return seen
        news = seen.news
        text = fetch_stacks(news.pid, self._peers.stack_file(news.rank))
        self._fetched[news.rank] = text
        return replace(seen, news=replace(news, line=stacks.users_line_in(text)))

    def _end_alone(self, sentence: Sentence, ranks: list[Seen]) -> None:
        """Ends without the store, which does not answer: a file tells who speaks, or the ranks'
        order.
        """
        able = [seen.news.rank for seen in ranks if not seen.is_frozen]
        is_first = self._group.rank == min(able)
        folder = self._pulse.stacks
        if folder is not None:
            # A disk that fails decides nothing.
            with contextlib.suppress(OSError):
                is_first = claim_file(folder, sentence.text)
        if not is_first:
            values = vars(sentence) | {"speaker": -1}
            sentence = Sentence(**values)
        self._board = None
        self._end(sentence)

    def _end(self, sentence: Sentence) -> None:
        """Does not return."""
        self._is_ending = True
        leave(sentence, group=self._group, board=self._board)
