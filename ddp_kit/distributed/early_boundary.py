"""A boundary at which all ranks exchange their packets at once, before the next one is due.

For short steps packets are many steps apart. Where steps become long in between, a stop would wait
for all of them. No rank can send early on its own: the others would not answer. So a thread on
every rank looks into the store, twice a second, whether one of them is in a hurry. If so each
thread promises that its rank does not pass a certain boundary before all have promised, and they
meet at the furthest one. Threads do not wait for steps, so nobody waits for a rank that waits.
"""

import threading
import time

import torch.distributed as dist

from ddp_kit.distributed.control_packet import ControlPacket
from ddp_kit.distributed.process_group import Group

POLL_S = 0.5
SOON_S = 0.02  # between two looks for the other ranks' promises
HURRY = "hurry"


class EarlyBoundary:
    """A rank's thread that makes and keeps promises. Every rank makes one, and closes it."""

    def __init__(self, packet: ControlPacket, group: Group, store: dist.Store):
        """Args: `store` nobody else uses these names in it."""
        self._packet = packet
        self._group = group
        self._store = store
        self._is_in_hurry = False
        self._is_over = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="early-boundary", daemon=True)
        self._thread.start()

    def ask(self) -> None:
        """Asks for an early boundary. Any thread may call it, on any rank, more than once."""
        if self._packet.is_due_next:
            return
        self._is_in_hurry = True
        self._wake.set()

    def close(self) -> None:
        """Ends the thread, unless the store keeps it."""
        self._is_over = True
        self._wake.set()
        self._thread.join(timeout=POLL_S)

    def _run(self) -> None:
        number = 0
        try:
            while not self._is_over and not self._group.failure_report.is_store_gone:
                # One after the other: this rank may still be on its way to the last one.
                if not self._packet.boundaries.is_to_meet and self._is_asked(f"{HURRY}/{number}"):
                    self._meet(f"{HURRY}/{number}")
                    number += 1
                self._wake.wait(POLL_S)
                self._wake.clear()
        except dist.DistError:
            # The store has gone with its rank, and the run ends by that.
            self._packet.boundaries.release()

    def _is_asked(self, key: str) -> bool:
        """Whether a rank asks for a meeting; this one does so here."""
        if self._is_in_hurry:
            self._is_in_hurry = False
            self._store.set(key, "")
        return self._store.check([key])

    def _meet(self, key: str) -> None:
        promised = self._packet.boundaries.promise()
        self._store.set(f"{key}/{self._group.rank}", str(promised))
        keys = [f"{key}/{rank}" for rank in range(self._group.world_size)]
        while not self._store.check(keys):
            time.sleep(SOON_S)
        self._packet.boundaries.meet_at(max(int(self._store.get(each)) for each in keys))
