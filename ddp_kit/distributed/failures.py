"""Who failed first, agreed through the store, and how each rank words it.

A rank that fails leaves word in the store before its connections close. Nothing is ended here:
peers end because connections close, and read here why they did.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

from ddp_kit.distributed.failure import BROKEN, GONE, KILLED, NO_PROGRESS, Failure
from ddp_kit.distributed.lost_peer import Loss, loss_of, words_of
from ddp_kit.distributed.peers import Peer, gone_of, living_words, sees_all
from ddp_kit.distributed.store_answers import answer_of
from ddp_kit.errors import DdpKitError
from ddp_kit.io.cgroup import MemoryKills
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
ANSWER_S = 5.0  # for the store to answer: it lives in rank 0, which may have stopped
DEATH_S = 2.0  # from the loss of a killed process's connections to its end
NOBODY = -1  # in place of the rank that failed first, where none has


class FailureReport:
    """One rank's end of the store in which failures are told.

    Without a store each rank is alone.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        store: dist.Store | None = None,
        hosts: bool = False,
        is_rank_0s: bool = False,
    ):
        """Args: `hosts` whether the store lives in this process, `is_rank_0s` in that of rank 0."""
        self._rank = rank
        self._world_size = world_size
        self._store = store
        self._hosts = hosts
        self._memory = MemoryKills()
        self._is_rank_0s = is_rank_0s
        self.peers: Sequence[Peer] = ()  # of all ranks, once they have met
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
        loss = loss_of(error)
        if self._world_size == 1 or loss is Loss.NONE:
            culprit, message = self.tell(error)
            return self._failure(error, culprit, message)
        self.before(error)
        # That a peer is lost is no news to the others.
        self._is_told = True
        self.note(LOST)
        found = self._ask(_first)
        if found is None:
            found = self._silent(error, loss)
        self.note(READ)
        return self._failure(error, *found)

    def _failure(self, error: BaseException, culprit: int, message: str) -> Failure:
        return Failure(
            error=error,
            rank=self._rank,
            culprit=culprit,
            message=message,
            is_silent=message.startswith((GONE, BROKEN, NO_PROGRESS)) or KILLED in message,
            is_alone=self._world_size == 1,
        )

    def _silent(self, error: BaseException, loss: Loss) -> tuple[int, str]:
        """Returns the culprit, as far as it is known, and what to say, of a rank that waited for a
        peer which left no word.
        """
        gone = self._gone(within_s=DEATH_S if loss is Loss.CLOSED else 0)
        if loss is Loss.TIMEOUT and not gone:
            return self._leave_word(
                NOBODY, f"{NO_PROGRESS} ({words_of(error)}); {living_words(self.peers)}"
            )
        if not gone and sees_all(self.peers):
            return self._leave_word(NOBODY, f"{BROKEN} ({words_of(error)})")
        is_sure = bool(gone)
        if not gone:
            gone = self._missing(LOST, within_s=SILENCE_S if self._rank == 0 else 0)
            is_sure = self._rank == 0 or self._store is None
        culprit = gone[0] if gone else NOBODY
        message = self._gone_words(gone)
        if is_sure:
            message = f"{message}; not heard of: rank {_listed(gone)}"
        where = self.last_seen(gone)
        if where:
            message = f"{message} ({where})"
        return culprit, message

    def _gone_words(self, gone: Sequence[int]) -> str:
        """Returns what to say of peers that left no word."""
        why = self._memory.words()
        if not why:
            return GONE
        victim = f"rank {gone[0]}" if len(gone) == 1 else "a peer"
        return f"{victim}{KILLED}{why}"

    def _gone(self, *, within_s: float) -> list[int]:
        """Returns the ranks whose process is known to have ended without a word: those that have
        lost a peer themselves have left, too.
        """
        gone = gone_of(self.peers, within_s=within_s)
        if not gone:
            return []
        silent = self._ask(lambda store: _without(store, LOST, self._world_size))
        if silent is None:
            # The store has died with rank 0, or stands still with it.
            return [0] if 0 in gone else gone
        return [rank for rank in gone if rank in silent]

    def _leave_word(self, culprit: int, message: str) -> tuple[int, str]:
        """Leaves word for the peers, and returns the one that was left first."""
        word = f"{culprit}\n{message}"
        reply = self._ask(lambda store: store.compare_set(FIRST, "", word))
        self._has_spoken = reply is not None
        return _read(reply) if reply else (culprit, message)

    def tell(self, error: BaseException) -> tuple[int, str]:
        """Leaves word of an error if this rank has not done so.

        Returns: (rank, message) of the first one that was left.
        """
        culprit = self._rank
        if isinstance(error, DdpKitError) and error.rank >= 0:
            culprit = error.rank
        message = self._memory.of_worker(words_of(error))
        if not self._is_told:
            self.before(error)
        if not self._is_told and not is_lost_peer(error):
            self._leave_word(culprit, message)
        self._is_told = True
        found = self._ask(_first)
        self.note(READ)
        return found or (culprit, message)

    @property
    def is_awaited(self) -> bool:
        """Whether peers have yet to read something that is here.

        That is this rank's word, or the store with another one's.
        """
        return self._has_spoken or (self._hosts and self._ask(_first) is not None)

    @property
    def is_store_gone(self) -> bool:
        """Whether the store is known to have ended with rank 0: of one that has, torch
        writes C++ stacks to stderr when it is asked.
        """
        return self._is_rank_0s and bool(self.peers) and self.peers[0].is_gone

    def linger(self) -> None:
        """Waits until every peer has read what is in the store, or LINGER_S is over."""
        self._missing(READ, within_s=LINGER_S)

    def note(self, what: str) -> None:
        """Notes that this rank has done with something, for `without`."""
        self._ask(lambda store: store.set(f"{what}/{self._rank}", ""))

    def without(self, what: str) -> list[int]:
        """Returns the ranks that have not noted `what` so far."""
        return self._missing(what, within_s=0)

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
        """Asks the store; None if there is none any more, or it does not answer in time."""
        store = self._store
        if store is None:
            return None
        try:
            return answer_of(lambda: question(store), within_s=ANSWER_S)
        except (dist.DistError, TimeoutError):
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
    return _read(store.get(FIRST))


def _read(word: bytes) -> tuple[int, str]:
    rank, _, message = word.decode().partition("\n")
    return int(rank), message


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _without(store: dist.Store, what: str, world_size: int) -> list[int]:
    """Returns the ranks that have not noted `what`."""
    return [rank for rank in range(world_size) if not store.check([f"{what}/{rank}"])]


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error is what a rank sees when it waits for another one in vain."""
    return loss_of(error) is not Loss.NONE
