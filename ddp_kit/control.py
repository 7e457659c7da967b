"""One small packet by which all ranks decide at the same step.

Owns: its layout, and when it is sent and read.
Refuses: errors (a raising rank's peers sit in an all-reduce), objects, and waiting: it is launched at one step boundary and
read at a later one.

The packet is an int64 vector reduced with MAX over a gloo group of its own. A field that names a rank is value x 2^16 + rank.
For very short steps it is sent every few steps, at an interval that all ranks derive from the packet itself.
"""

import math
import time
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.distributed as dist

from ddp_kit.groups import Group

INTERVAL_S = 0.1  # between packets where steps are shorter; decides how late a stop may be, so never above 1 s
SHIFT = 16


class Field(IntEnum):
    """Positions in the packet."""

    STOP = 0  # signal number x 2^16 + rank
    CULPRIT = 1  # (step of a non-finite loss + 1) x 2^16 + rank
    STEP_US = 2  # longest time of a step, microseconds
    SAVE = 3  # 1: a save is due by wall time


@dataclass(frozen=True)
class Decision:
    """What all ranks know at this boundary. Zero signal: no stop. Culprit rank -1: none."""

    signal: int = 0
    signal_rank: int = -1
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
        self._next = 0
        self._last = (0, time.perf_counter())
        self._culprit_step = -1

    def name_culprit(self, step: int) -> None:
        """Notes that this rank's loss of `step` was not finite."""
        self._culprit_step = step

    def boundary(self, step: int, *, signal: int, saves: bool = False) -> Decision:
        """Reads the packet that is due and sends the next one. Returns an empty decision where nothing was due."""
        if step < self._next:
            return NOTHING
        decision = self._read()
        interval = self._interval()
        self._send(step, signal=signal, saves=saves)
        self._next = step + interval
        return decision

    def exchange(self, step: int, *, signal: int = 0) -> Decision:
        """Sends and reads at once: for moments that all ranks reach together, such as a step that was not applied."""
        self._read()
        self._send(step, signal=signal)
        return self._read()

    def close(self) -> None:
        """Completes the packet in flight, so that no rank leaves another waiting."""
        self._read()

    def _send(self, step: int, *, signal: int, saves: bool = False) -> None:
        now = time.perf_counter()
        steps, since = step - self._last[0], now - self._last[1]
        self._last = (step, now)
        rank = self._group.rank
        self._packet[Field.STOP] = (signal << SHIFT) + rank if signal else 0
        self._packet[Field.CULPRIT] = ((self._culprit_step + 1) << SHIFT) + rank if self._culprit_step >= 0 else 0
        self._packet[Field.STEP_US] = int(since / steps * 1e6) if steps > 0 else 0
        self._packet[Field.SAVE] = int(saves)
        if self._group.control is not None:
            self._work = dist.all_reduce(self._packet, dist.ReduceOp.MAX, group=self._group.control, async_op=True)

    def _read(self) -> Decision:
        if self._work is not None:
            self._work.wait()
            self._work = None
        stop, culprit, _, saves = self._packet.tolist()
        mask = (1 << SHIFT) - 1
        return Decision(
            signal=stop >> SHIFT,
            signal_rank=stop & mask if stop else -1,
            culprit_step=(culprit >> SHIFT) - 1,
            culprit_rank=culprit & mask if culprit else -1,
            saves=bool(saves),
        )

    def _interval(self) -> int:
        step_s = int(self._packet[Field.STEP_US]) / 1e6
        return max(1, min(1000, math.floor(INTERVAL_S / step_s))) if step_s > 0 else 1
