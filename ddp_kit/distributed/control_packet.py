"""One small packet by which all ranks decide at the same step.

Owns: its layout, and when it is sent and read.
Refuses: errors (a raising rank's peers sit in an all-reduce), objects, and waiting: it is launched at one step boundary and
read at a later one.

The packet is an int64 vector reduced with MAX over a gloo group of its own. A field that names a rank is value x 2^16 + rank.
For very short steps it is sent every few steps, at an interval that all ranks derive from the packet itself. An evaluation's micro-batches
are such steps too.
"""

import math
import time
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.distributed as dist

from ddp_kit.distributed.process_group import Group

INTERVAL_S = 0.1  # between packets where steps are shorter; decides how late a stop may be, so never above 1 s
SHIFT = 16


class Field(IntEnum):
    """Positions in the packet."""

    STOP = 0  # why to stop x 2^16 + rank
    CULPRIT = 1  # (step of a non-finite loss + 1) x 2^16 + rank
    STEP_US = 2  # longest time of a step, microseconds
    SAVE = 3  # 1: a save is due by wall time, or asked for


@dataclass(frozen=True)
class Decision:
    """What all ranks know at this boundary. `stop` is a `preemption.Stop`, 0: none. Culprit rank -1: none."""

    stop: int = 0
    stop_rank: int = -1
    culprit_step: int = -1
    culprit_rank: int = -1
    saves: bool = False


NOTHING = Decision()


class Control:
    """Sends this rank's packet and reads what all ranks agreed. Every rank calls `boundary` after every step."""

    def __init__(self, group: Group):
        self._group = group
        self._work: dist.Work | None = None
        self._packet = torch.zeros(len(Field), dtype=torch.int64)
        self._position = self._next = 0  # in boundaries of this life
        self._last = (0, time.perf_counter())
        self._kind, self._is_new_kind = "training", False
        self._step_s: dict[str, float] = {}  # the last one of each kind, on the slowest rank
        self._culprit_step = -1

    def name_culprit(self, step: int) -> None:
        """Notes that this rank's loss of `step` was not finite."""
        self._culprit_step = step

    def boundary(self, *, stop: int = 0, saves: bool = False) -> Decision:
        """Reads the packet that is due and sends the next one. Returns an empty decision where nothing was due."""
        self._position += 1
        if self._position < self._next:
            return NOTHING
        decision = self._read()
        step_s = int(self._packet[Field.STEP_US]) / 1e6
        interval = 1 if self._is_new_kind else _interval(step_s)
        if step_s and not self._is_new_kind:
            self._step_s[self._kind] = step_s
        self._is_new_kind = False
        self._send(stop=stop, saves=saves and not decision.saves)  # which is about to be done
        self._next = self._position + interval
        return decision

    def change_pace(self, kind: str) -> None:
        """The boundaries to come are of another kind, whose length is not known yet. Every rank calls it."""
        self._kind, self._is_new_kind, self._next = kind, True, 0
        self._last = (self._position, time.perf_counter())

    def exchange(self, *, stop: int = 0) -> Decision:
        """Sends and reads at once: for moments that all ranks reach together, such as a step that was not applied."""
        self._read()
        self._send(stop=stop)
        return self._read()

    @property
    def in_flight(self) -> dist.Work | None:
        """The packet on its way, to be waited for before what was sent after it: once a sum has failed unread, because a peer is lost, gloo
        lets later ones of the same group wait until their timeout.
        """
        return self._work

    def close(self) -> None:
        """Completes the packet in flight, so that no rank leaves another waiting."""
        self._read()

    def agreement_s(self) -> tuple[float, float]:
        """Returns how long a stop waits at most for the end of a step, and then for all ranks to know of it: sent at the next packet,
        read at the one after."""
        return max(
            ((step_s, 2 * _interval(step_s) * step_s) for step_s in self._step_s.values()),
            key=sum,
            default=(0.0, 0.0),
        )

    def _send(self, *, stop: int, saves: bool = False) -> None:
        now = time.perf_counter()
        steps, since = self._position - self._last[0], now - self._last[1]
        self._last = (self._position, now)
        rank = self._group.rank
        self._packet[Field.STOP] = (stop << SHIFT) + rank if stop else 0
        self._packet[Field.CULPRIT] = (
            ((self._culprit_step + 1) << SHIFT) + rank if self._culprit_step >= 0 else 0
        )
        self._packet[Field.STEP_US] = int(since / steps * 1e6) if steps > 0 else 0
        self._packet[Field.SAVE] = int(saves)
        if self._group.control is not None:
            self._work = dist.all_reduce(
                self._packet, dist.ReduceOp.MAX, group=self._group.control, async_op=True
            )

    def _read(self) -> Decision:
        if self._work is not None:
            self._work.wait()
            self._work = None
        stop, culprit, _, saves = self._packet.tolist()
        mask = (1 << SHIFT) - 1
        return Decision(
            stop=stop >> SHIFT,
            stop_rank=stop & mask if stop else -1,
            culprit_step=(culprit >> SHIFT) - 1,
            culprit_rank=culprit & mask if culprit else -1,
            saves=bool(saves),
        )


def _interval(step_s: float) -> int:
    return max(1, min(1000, math.floor(INTERVAL_S / step_s))) if step_s > 0 else 1
