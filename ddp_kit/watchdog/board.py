"""The board on which ranks leave their words for each other: a store connection of its own, asked
by a thread of its own.

A client of the store blocks in C for as long as its server is stopped. So nobody waits for this
thread: who wants to know looks at what it has found, and at how long its last question is out.
"""

import contextlib
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ddp_kit.watchdog.news import News, Seen, read_news

# For a key that is there, or was.
ANSWER_S = 5.0
VERDICT = "verdict"
POLL_S = 0.5


class Board:
    """This rank's end of the board. The watchdog writes its wishes and reads the findings."""

    def __init__(self, store: dist.Store, *, rank: int, world_size: int):
        """Starts the thread; it connects at the first question. Whoever makes one closes it."""
        self._given = store
        self._rank = rank
        self._ranks = range(world_size)
        self._store: dist.Store | None = None
        self._socket: socket.socket | None = None
        # What this rank says, whether it wants to know all others' words, and its verdict.
        self.own = ""
        self.wants_all = True
        self.claim = ""
        self.is_done = False
        # What was found.
        self.verdict = ""
        self.done: set[int] = set()
        self.is_gone = False
        self.asked_at = 0.0
        self.answers = 0
        self._seen: dict[int, Seen] = {}
        self._read_at = 0.0
        self._wake = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ddp_kit board", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Lets the thread say and ask what is there, unless it still waits for an answer."""
        if not self._wake.is_set():
            self.asked_at = time.monotonic()
            self._wake.set()

    @property
    def waits_s(self) -> float:
        """For how long the last question is out, 0 if it was answered."""
        if not self._wake.is_set() or self.is_gone:
            return 0.0
        return time.monotonic() - self.asked_at

    def seen(self) -> dict[int, Seen]:
        """Returns the other ranks that have said something, by rank."""
        return dict(self._seen)

    def close(self) -> None:
        """Ends the thread, unless the store keeps it."""
        self._over.set()
        self._wake.set()
        self._thread.join(timeout=1.0)
        if self._socket is not None:
            self._socket.close()

    def _run(self) -> None:
        while not self._over.is_set():
            # `close` may come while a question is out: then nobody sets it again.
            if not self._wake.wait(POLL_S):
                continue
            if self._over.is_set():
                break
            try:
                if not self.is_gone:
                    self._exchange()
                    self.answers += 1
            except (dist.DistError, RuntimeError, OSError):
                # Rank 0 or the agent that had it is gone: others find out why.
                self.is_gone = True
            self._wake.clear()
        self._say_goodbye()

    def _say_goodbye(self) -> None:
        with contextlib.suppress(dist.DistError, RuntimeError, OSError):
            if self._store is not None and not self._has_hung_up():
                left = News(rank=self._rank, has_left=True)
                self._store.set(f"news/{self._rank}", left.text())

    def _exchange(self) -> None:
        if self._store is None:
            with _noting_socket(self._given) as noted:
                self._store = self._given.clone()
                self._store.set_timeout(timedelta(seconds=ANSWER_S))
                self._store.set(f"news/{self._rank}", self.own)
                self._store.check([VERDICT])
            self._socket = next(iter(noted), None)
        if self._has_hung_up():
            self.is_gone = True
            return
        store = self._store
        store.set(f"news/{self._rank}", self.own)
        if self.claim and not self.verdict:
            self.verdict = store.compare_set(VERDICT, "", self.claim).decode()
        elif not self.verdict and store.check([VERDICT]):
            self.verdict = store.get(VERDICT).decode()
        if self.is_done:
            store.set(f"done/{self._rank}", "")
            self.done = {rank for rank in self._ranks if store.check([f"done/{rank}"])}
        if self.wants_all:
            self._read_all(store)

    def _read_all(self, store: dist.Store) -> None:
        now = time.monotonic()
        # A pause is this process's own: it was stopped, or the whole job was.
        since_s = min(now - self._read_at, 2.0)
        self._read_at = now
        others = [rank for rank in self._ranks if rank != self._rank]
        there = [rank for rank in others if store.check([f"news/{rank}"])]
        if not there:
            return
        texts = store.multi_get([f"news/{rank}" for rank in there])
        for rank, text in zip(there, texts, strict=True):
            news = read_news(text.decode())
            if news is None:
                continue
            before = self._seen.get(rank)
            silent_s = 0.0
            if before is not None and before.news.number == news.number:
                silent_s = before.silent_s + since_s
            self._seen[rank] = Seen(news=news, silent_s=silent_s)

    def _has_hung_up(self) -> bool:
        """Whether the store has closed the connection: asking it would write C++ stacks to
        stderr.
        """
        if self._socket is None:
            return False
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True


@contextmanager
def _noting_socket(store: dist.Store) -> Iterator[list[socket.socket]]:
    """Notes the connections to a store that are made within it; none where it is a file."""
    port = _port_of(store)
    noted: list[socket.socket] = []
    before = _connections_to(port)
    yield noted
    for descriptor in _connections_to(port) - before:
        with contextlib.suppress(OSError):
            noted.append(socket.socket(fileno=os.dup(descriptor)))


def _port_of(store: dist.Store) -> int:
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store.port if isinstance(store, dist.TCPStore) else -1


def _connections_to(port: int) -> set[int]:
    """Returns this process's connections to a port, by descriptor."""
    found: set[int] = set()
    if port < 0:
        return found
    for path in Path("/dev/fd").iterdir():
        # The listing's own descriptor is closed by now.
        with contextlib.suppress(OSError):
            descriptor = int(path.name)
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                if connection.getpeername()[1] == port:
                    found.add(descriptor)
    return found
