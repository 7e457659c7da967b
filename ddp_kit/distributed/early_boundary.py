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

POLL_S = 0.5
SOON_S = 0.02  # between two looks for the other ranks' promises
HURRY = "hurry"


class EarlyBoundary:
    """A rank's thread that makes and keeps promises. Every rank makes one, and closes it."""

    def __init__(self, packet: ControlPacket, store: dist.Store, *, rank: int, world_size: int):
        """Args: `store` nobody else uses these names in it."""
        self._packet = packet
        self._store = store
        self._rank = rank
        self._world_size = world_size
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
            while not self._is_over:
                key = f"{HURRY}/{number}"
                if self._is_in_hurry:
                    self._store.set(key, "")
                if self._store.check([key]):
                    self._is_in_hurry = False
                    self._meet(key)
                    number += 1
                self._wake.wait(POLL_S)
                self._wake.clear()
        except dist.DistError:
            # The store has gone with its rank, and the run ends by that.
            self._packet.release()

    def _meet(self, key: str) -> None:
        promised = self._packet.promise()
        self._store.set(f"{key}/{self._rank}", str(promised))
        keys = [f"{key}/{rank}" for rank in range(self._world_size)]
        while not self._store.check(keys):
            time.sleep(SOON_S)
        self._packet.meet_at(max(int(self._store.get(each)) for each in keys))
