"""Who failed first, agreed through the store: a rank that fails leaves word there before its connections close.

Owns: leaving word and finding the culprit's, and how each rank words a failure.
Refuses: ending anything. Peers end because connections close; this says why they did.
"""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from ddp_kit.errors import DdpKitError, summary

Answer = TypeVar("Answer")
FIRST, LOST, READ = "first", "lost", "read"
LAST_WORDS_S = 2.0  # for the culprit to leave word, once its peers have lost it
LINGER_S = 5.0  # for the peers to read it, where the store would end with this process


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A failure as one rank sees it: its own error, and the one that came first. `gone` are the ranks that left no word."""

    error: BaseException
    rank: int
    culprit: int
    message: str
    gone: tuple[int, ...] = ()
    is_alone: bool = False

    @property
    def is_own(self) -> bool:
        """Whether this rank failed by itself, not because of another one: alone, first, or in the same way as the first."""
        return not self.gone and (self.culprit == self.rank or self.message == summary(self.error))

    @property
    def reason(self) -> str:
        """The failure in one text, for status.json."""
        return self.message if self.gone or self.is_alone else f"rank {self.culprit}: {self.message}"

    def words(self) -> str:
        """Returns what this rank writes to stderr: the culprit its message or traceback, others a line, or nothing where all fail alike."""
        where = f"rank {self.rank} on {socket.gethostname()}"
        if self.gone:
            return f"{where}: {self.message}\n"
        if self.culprit != self.rank:
            return "" if self.is_own else f"{where}: ended because rank {self.culprit} failed: {self.message.splitlines()[0]}\n"
        if isinstance(self.error, DdpKitError):
            return f"{self.error}\n"
        if isinstance(self.error, SystemExit):
            return f"{where}: {self.message}\n"
        head = "" if self.is_alone else f"{where} failed:\n"
        return head + "".join(traceback.format_exception(self.error))


class Blame:
    """One rank's end of the store in which failures are told. Without a store each rank is alone."""

    def __init__(
        self, *, rank: int, world_size: int, store: dist.Store | None = None, hosts: bool = False, leave: Callable[[], None] = lambda: None
    ):
        """Args: `hosts` whether the store lives in this process; `leave()` closes this rank's connections."""
        self._rank, self._world_size, self._store, self._hosts, self._leave = rank, world_size, store, hosts, leave
        self._is_told = False
        self._gone: tuple[int, ...] = ()

    def judge(self, error: BaseException) -> Verdict:
        """Tells the peers of this rank's failure and returns whose came first. Every rank that fails calls it, before it leaves the group."""
        if self._world_size == 1 or not is_lost_peer(error):
            culprit, message = self.tell(error)
            return Verdict(error=error, rank=self._rank, culprit=culprit, message=message, is_alone=self._world_size == 1)
        self._is_told = True  # that a peer is lost is no news to the others
        self._note(LOST)
        self._leave()  # at once: peers that wait for this rank, and not for the lost one, notice by this
        end = time.monotonic() + LAST_WORDS_S
        while (found := self._ask(_first)) is None and self._store is not None and time.monotonic() < end:
            time.sleep(0.05)
        self._note(READ)
        if found is not None:
            return Verdict(error=error, rank=self._rank, culprit=found[0], message=found[1])
        gone = self._gone = self._missing(LOST)
        ranks = ", ".join(map(str, gone))
        message = f"a peer is gone that left no word (killed, or out of memory); not heard of: rank {ranks}"
        return Verdict(error=error, rank=self._rank, culprit=gone[0], message=message, gone=gone)

    def tell(self, error: BaseException) -> tuple[int, str]:
        """Leaves word of an error if this rank has not done so. Returns (rank, message) of the first one that was left."""
        own = f"{self._rank}\n{summary(error)}"
        if not self._is_told and not is_lost_peer(error):
            self._ask(lambda store: store.compare_set(FIRST, "", own))
        self._is_told = True
        found = self._ask(_first)
        self._note(READ)
        rank, _, message = own.partition("\n")
        return found or (int(rank), message)

    def linger(self) -> None:
        """Keeps this process, and so the store if it is here, until every peer has read it or LINGER_S is over."""
        end = time.monotonic() + LINGER_S
        while self._hosts and set(self._missing(READ)) - set(self._gone) and time.monotonic() < end:
            time.sleep(0.02)

    def _note(self, what: str) -> None:
        self._ask(lambda store: store.set(f"{what}/{self._rank}", ""))

    def _missing(self, what: str) -> tuple[int, ...]:
        """Returns the ranks that have not noted `what`; where the store itself has died, rank 0, which held it."""
        found = self._ask(lambda store: [rank for rank in range(self._world_size) if not store.check([f"{what}/{rank}"])])
        return (0,) if found is None else tuple(found)

    def _ask(self, question: Callable[[dist.Store], Answer]) -> Answer | None:
        """Asks the store; None if there is none any more. As it dies torch writes C++ stacks to stderr, which would hide our one line."""
        if self._store is None:
            return None
        with _without_stderr():
            try:
                return question(self._store)
            except dist.DistError:
                self._store = None
                return None


def _first(store: dist.Store) -> tuple[int, str] | None:
    if not store.check([FIRST]):
        return None
    rank, _, message = store.get(FIRST).decode().partition("\n")
    return int(rank), message


@contextmanager
def _without_stderr() -> Iterator[None]:
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error is what a rank sees when another one has gone."""
    if isinstance(error, (dist.DistNetworkError, dist.DistBackendError)):
        return True
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Connection refused",
        "Timed out waiting",
        "gloo/transport",
    )
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
