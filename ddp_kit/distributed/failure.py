"""A failure as one rank sees it, and how it words it."""

import socket
import traceback
from dataclasses import dataclass

from ddp_kit.distributed.lost_peer import words_of
from ddp_kit.errors import DdpKitError

# What is said of a peer that left no word.
GONE = "a peer is gone that left no word (killed, or out of memory)"
KILLED = " was killed by the kernel: "
BROKEN = "a connection between ranks broke, though every rank's process lives"
NO_PROGRESS = "no progress: a collective was not completed in time"


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
    def is_hang(self) -> bool:
        """Whether nothing moved, and nobody is known to have failed."""
        return self.message.startswith(NO_PROGRESS)

    @property
    def is_own(self) -> bool:
        """Whether this rank failed by itself, not because of another one.

        It failed alone, first, or in the same way as the first.
        """
        if self.is_silent:
            return False
        return self.culprit == self.rank or self.message == words_of(self.error)

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
