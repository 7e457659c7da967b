"""The ranks of one's own host, looked at past all that they say: their pulses in memory, the state
of their processes.
"""

import contextlib
import os
from dataclasses import dataclass, replace

from ddp_kit.distributed.pulse import Phase
from ddp_kit.io.process import process_state
from ddp_kit.io.pulse_file import open_of, read, text_of
from ddp_kit.watchdog.news import News, Seen


@dataclass
class _Files:
    pid: int
    pulse: int
    stacks: int
    marks: int = -1
    idle_s: float = 0.0


class Peers:
    """What is open of the peers on this host. Whoever makes it closes it."""

    def __init__(self, host: tuple[str, str]):
        self._host = host
        self._files: dict[int, _Files] = {}

    def meet(self, seen: Seen) -> None:
        """Opens what a peer on this host has, while it lives: it can be read after its death."""
        news = seen.news
        if seen.host != self._host or news.rank in self._files:
            return
        self._files[news.rank] = _Files(
            pid=news.pid,
            pulse=open_of(news.pid, news.pulse_file),
            stacks=open_of(news.pid, news.stack_file),
        )

    def look(self, seen: Seen, *, passed_s: float) -> Seen:
        """Returns a peer that says nothing as it is: where its main thread really stands, and for
        how long.
        """
        files = self._files.get(seen.news.rank)
        if files is None:
            return seen
        state = process_state(files.pid)
        words = read(files.pulse)
        if words is None:
            return replace(seen, state=state)
        if words.marks == files.marks:
            files.idle_s += passed_s
        else:
            files.idle_s = 0.0
        files.marks = words.marks
        idle_s = files.idle_s
        news = seen.news
        if seen.position == (words.step, words.part, words.phase):
            # It has not moved since it last said so.
            idle_s = max(idle_s, seen.idle_s)
        else:
            news = replace(news, line="", detail="", is_waiting=False)
        news = replace(
            news,
            phase=Phase(words.phase),
            step=words.step,
            part=words.part,
            idle_s=idle_s,
            limit_s=words.limit_s or seen.news.limit_s,
        )
        return replace(seen, news=news, silent_s=0.0, state=state)

    def stack_file(self, rank: int) -> int:
        """Returns a descriptor of a peer's stacks, -1 without one."""
        files = self._files.get(rank)
        return -1 if files is None else files.stacks

    def last_words(self, rank: int) -> tuple[News, str] | None:
        """Returns where a peer was as it died, and the stacks that it has left, "" without any."""
        files = self._files.get(rank)
        words = None if files is None else read(files.pulse)
        if files is None or words is None:
            return None
        news = News(rank=rank, pid=files.pid, phase=Phase(words.phase), step=words.step)
        return news, text_of(files.stacks)

    def close(self) -> None:
        """Closes all files."""
        for files in self._files.values():
            for descriptor in (files.pulse, files.stacks):
                with contextlib.suppress(OSError):
                    if descriptor >= 0:
                        os.close(descriptor)
        self._files.clear()
