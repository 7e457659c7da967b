"""Who failed first, agreed through the store, and how each rank words it.

A rank that fails leaves word in the store before its connections close. Nothing is ended here:
peers end because connections close, and read here why they did.
"""

import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from ddp_kit.errors import DdpKitError, summary
from ddp_kit.io.polling import wait_until

Answer = TypeVar("Answer")
# Keys of the store: the first word, and who has lost a peer, or has read the word.
FIRST = "first"
LOST = "lost"
READ = "read"
# After which rank 0 takes a rank for dead: the others have all noticed a loss by then.
SILENCE_S = 1.0
LINGER_S = 5.0  # for the peers to lose the connection and read why
PAUSE_S = 0.02
LOSS_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Timed out waiting",
    "gloo/transport",
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A failure as one rank sees it: its own error, and whose came first."""

    error: BaseException
    rank: int
    culprit: int  # the rank that failed first, -1 if it is not known
    message: str  # of the first failure
    is_silent: bool = False  # a peer is gone and left no word
    is_alone: bool = False  # there are no other ranks

    @property
    def is_own(self) -> bool:
        """Whether this rank failed by itself, not because of another one.

        It failed alone, first, or in the same way as the first.
        """
        if self.is_silent:
            return False
        return self.culprit == self.rank or self.message == summary(self.error)

    @property
    def reason(self) -> str:
        """The failure in one text, for status.json."""
        if self.is_silent or self.is_alone:
            return self.message
        return f"rank {self.culprit}: {self.message}"

    def words(self) -> str:
        """Returns what this rank writes to stderr.

        The culprit writes its message or traceback, others a line, or nothing where all fail alike.
        """
        where = f"rank {self.rank} on {socket.gethostname()}"
        if self.is_silent:
            return f"{where}: {self.message}\n"
        if self.culprit != self.rank:
            if self.is_own:
                return ""
            first_line = self.message.splitlines()[0]
            return f"{where}: ended because rank {self.culprit} failed: {first_line}\n"
        if isinstance(self.error, DdpKitError):
            return f"{self.error}\n"
        if isinstance(self.error, SystemExit):
            return f"{where}: {self.message}\n"
        head = "" if self.is_alone else f"{where} failed:\n"
        return head + "".join(traceback.format_exception(self.error))


class FailureReport:
    """One rank's end of the store in which failures are told.

    Without a store each rank is alone.
    """

    def __init__(
        self, *, rank: int, world_size: int, store: dist.Store | None = None, hosts: bool = False
    ):
        """Args: `hosts` whether the store lives in this process."""
        self._rank = rank
        self._world_size = world_size
        self._store = store
        self._hosts = hosts
        self._is_told = False
        self._has_spoken = False
        # Hears of an error before anybody is asked about it.
        self.before: Callable[[BaseException], None] = _nothing
        # Returns where ranks were that are gone, in words.
        self.last_seen: Callable[[Sequence[int]], str] = _unknown

    def find_culprit(self, error: BaseException) -> Failure:
        """Tells the peers of this rank's failure and returns whose came first.

        Every rank that fails calls it, before it leaves the group. Word is left before connections
        close. So whoever loses one and finds no word knows that a peer died without any.
        """
        if self._world_size == 1 or not is_lost_peer(error):
            culprit, message = self.tell(error)
            return Failure(
                error=error,
                rank=self._rank,
                culprit=culprit,
                message=message,
                is_alone=self._world_size == 1,
            )
        self.before(error)
        # That a peer is lost is no news to the others.
        self._is_told = True
        self._note(LOST)
        found = self._ask(_first)
        self._note(READ)
        if found is None:
            return self._silent(error)
        culprit, message = found
        return Failure(error=error, rank=self._rank, culprit=culprit, message=message)

    def _silent(self, error: BaseException) -> Failure:
        """Returns the failure of a rank that lost a peer which left no word."""
        gone = self._missing(LOST, within_s=SILENCE_S if self._rank == 0 else 0)
        message = "a peer is gone that left no word (killed, or out of memory)"
        if self._rank == 0 or self._store is None:
            message += f"; not heard of: rank {', '.join(map(str, gone))}"
        where = self.last_seen(gone)
        if where:
            message += f" ({where})"
        return Failure(
            error=error,
            rank=self._rank,
            culprit=gone[0] if gone else -1,
            message=message,
            is_silent=True,
        )

    def tell(self, error: BaseException) -> tuple[int, str]:
        """Leaves word of an error if this rank has not done so.

        Returns: (rank, message) of the first one that was left.
        """
        message = summary(error)
        if not self._is_told:
            self.before(error)
        if not self._is_told and not is_lost_peer(error):
            word = f"{self._rank}\n{message}"
            reply = self._ask(lambda store: store.compare_set(FIRST, "", word))
            self._has_spoken = reply is not None
        self._is_told = True
        found = self._ask(_first)
        self._note(READ)
        return found or (self._rank, message)

    @property
    def is_awaited(self) -> bool:
        """Whether peers have yet to read something that is here.

        That is this rank's word, or the store with another one's.
        """
        return self._has_spoken or (self._hosts and self._ask(_first) is not None)

    def linger(self) -> None:
        """Waits until every peer has read what is in the store, or LINGER_S is over."""
        self._missing(READ, within_s=LINGER_S)

    def _note(self, what: str) -> None:
        self._ask(lambda store: store.set(f"{what}/{self._rank}", ""))

    def _missing(self, what: str, *, within_s: float) -> list[int]:
        """Returns the ranks that do not note `what` in time.

        Where the store itself has died, that is rank 0, which held it.
        """
        missing: list[int] | None = None

        def all_have() -> bool:
            nonlocal missing
            missing = self._ask(lambda store: _without(store, what, self._world_size))
            return not missing

        wait_until(all_have, within_s=within_s, pause_s=PAUSE_S)
        return [0] if missing is None else missing

    def _ask(self, question: Callable[[dist.Store], Answer]) -> Answer | None:
        """Asks the store; None if there is none any more."""
        if self._store is None:
            return None
        # As it dies torch writes C++ stacks to stderr, which would hide our one line.
        with _without_stderr():
            try:
                return question(self._store)
            except dist.DistError:
                self._store = None
                return None


def _nothing(error: BaseException) -> None:
    """Nobody wants to hear of it."""


def _unknown(gone: Sequence[int]) -> str:
    """Nobody knows."""
    return ""


def _first(store: dist.Store) -> tuple[int, str] | None:
    if not store.check([FIRST]):
        return None
    rank, _, message = store.get(FIRST).decode().partition("\n")
    return int(rank), message


def _without(store: dist.Store, what: str, world_size: int) -> list[int]:
    """Returns the ranks that have not noted `what`."""
    return [rank for rank in range(world_size) if not store.check([f"{what}/{rank}"])]


@contextmanager
def _without_stderr() -> Iterator[None]:
    if sys.stderr is not None:
        sys.stderr.flush()
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
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
    if not isinstance(error, RuntimeError):
        return False
    return any(sign in str(error) for sign in LOSS_SIGNS)
