"""What the ranks of a doctor tell each other, through the store: nobody waits without a deadline.

Rank 0 hears all others and tells them what comes next. A rank that does not answer is named; if
even this process is stuck, in a system call or in C code, a thread of its own ends it.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch.distributed as dist

from ddp_kit.distributed.topology import Topology
from ddp_kit.io.json_lines import json_text
from ddp_kit.io.polling import wait_until

PAUSE_S = 0.02
# By which a rank that is not the first waits longer for its word.
LATER_S = 5.0
GIVE_BACK_S = 1.0


class Talk:
    """One rank's end of the talk. Without a store it is alone, and hears itself."""

    def __init__(self, topology: Topology, *, within_s: float):
        """Args: `within_s` seconds that each part of it may take."""
        self.topology = topology
        self.within_s = within_s
        self.store: dist.Store | None = None
        self._own: dict[str, Any] = {}

    @property
    def everybody(self) -> range:
        """All ranks."""
        return range(self.topology.world_size)

    def tell(self, what: str, value: object) -> None:
        """Leaves a rank's word of something for all who ask."""
        self._own[what] = value
        if self.store is not None:
            self.store.set(f"{what}/{self.topology.rank}", json_text(value))

    def hear(self, what: str, ranks: Collection[int]) -> Mapping[int, Any]:
        """Returns the words of ranks, without those that did not come in time."""
        if self.store is None:
            return {0: self._own[what]}
        found: dict[int, Any] = {}
        store = self.store

        def all_have() -> bool:
            for rank in ranks:
                key = f"{what}/{rank}"
                if rank not in found and store.check([key]):
                    found[rank] = json.loads(store.get(key))
            return len(found) == len(ranks)

        wait_until(all_have, within_s=self.within_s, pause_s=PAUSE_S)
        return found

    def hear_first(self, what: str, *, parts: float = 1) -> Any:
        """Returns rank 0's word, None if it does not come.

        Args: `parts` how many parts of the talk rank 0 has before it.
        """
        if self.store is None:
            return self._own.get(what)
        store = self.store
        key = f"{what}/0"
        longest_s = parts * self.within_s + LATER_S
        if not wait_until(lambda: store.check([key]), within_s=longest_s, pause_s=PAUSE_S):
            return None
        return json.loads(store.get(key))

    def linger(self, what: str, *, others: int = 0) -> None:
        """Keeps the store until the others have heard, for some seconds.

        Args: `others` how many of them there are, for rank 0, which has the store.
        """
        if self.store is None:
            return
        store = self.store
        if self.topology.rank:
            store.add(f"heard {what}", 1)
            return
        wait_until(
            lambda: store.add(f"heard {what}", 0) >= others, within_s=LATER_S, pause_s=PAUSE_S
        )


class Deadline:
    """Ends this process if it is stuck, once its time is over, and says where it was.

    `stage` is what it is at.
    """

    def __init__(
        self,
        *,
        rank: int,
        within_s: float,
        last_words: Callable[[str], None],
        give_back: Callable[[], None],
    ):
        """Args: `last_words` is told that this rank is stuck, and prints what there is; `give_back`
        removes what the process has left, if it can.
        """
        self.stage = "start"
        self._rank = rank
        self._within_s = within_s
        self._last_words = last_words
        self._give_back = give_back
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="deadline", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """The process has come to its end by itself."""
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        if self._is_over.wait(self._within_s):
            return
        try:
            self._last_words(f"rank {self._rank} is stuck in: {self.stage}")
            sys.stdout.flush()
            sys.stderr.flush()
            # It may hang as this process does.
            helper = threading.Thread(target=self._give_back, name="give back", daemon=True)
            helper.start()
            helper.join(GIVE_BACK_S)
        finally:
            # Whatever it is stuck in may hold up an ordinary end too.
            os._exit(1)
