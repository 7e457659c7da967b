"""One small packet by which all ranks decide at the same step.

It is launched at one step boundary and read at a later one, so that nobody waits for it. Errors do
not travel in it: the peers of a rank that raises sit in an all-reduce.

The packet is an int64 vector reduced with MAX over a gloo group of its own. A field that names a
rank is value x 2^16 + rank. For very short steps it is sent every few steps, at an interval that
all ranks derive from the packet itself. An evaluation's micro-batches are such steps too.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.distributed as dist

from ddp_kit.distributed.boundaries import Boundaries
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.pulse import Phase

# Between packets where steps are shorter. It decides how late a stop may be, so never above 1 s.
INTERVAL_S = 0.1
MOST_STEPS = 1000  # between packets
SHIFT = 16
RANK_MASK = (1 << SHIFT) - 1


class Field(IntEnum):
    """Positions in the packet."""

    STOP = 0  # why to stop x 2^16 + rank
    CULPRIT = 1  # (step of a non-finite loss + 1) x 2^16 + rank
    STEP_US = 2  # longest time of a step, microseconds
    SAVE = 3  # 1: a save is due by wall time, or asked for
    DIGEST = 4  # of what all ranks should hold alike, 0: none
    AGAINST = 5  # its negative: the largest one is the smallest digest's


@dataclass(frozen=True)
class Decision:
    """What all ranks know at this boundary. Step and rank -1: none."""

    stop: int = 0  # a `stopping.signals.Stop`, 0: none
    stop_rank: int = -1
    culprit_step: int = -1  # the step whose loss was not finite
    culprit_rank: int = -1
    saves: bool = False  # a save is due


NOTHING = Decision()


class ControlPacket:
    """Sends this rank's packet and reads what all ranks agreed.

    Every rank calls `boundary` after every step.
    """

    def __init__(self, group: Group):
        self._group = group
        self._work: dist.Work | None = None
        self._packet = torch.zeros(len(Field), dtype=torch.int64)
        # In boundaries of this attempt: where we are, and where the next packet is due.
        self.boundaries = Boundaries(group.timeout_s)
        self._next = 0
        # Position and time of the last packet that was sent.
        self._last = (0, time.perf_counter())
        self._kind = "training"
        self._is_new_kind = False
        # The last one of each kind, on the slowest rank.
        self._step_s: dict[str, float] = {}
        self._culprit_step = -1
        # Gives the digest that the next packet takes.
        self._digest: Callable[[], int] | None = None
        self._verdict: bool | None = None

    def compare(self, digest: Callable[[], int]) -> None:
        """Lets the next packet take a number, from 0 on, that should be the same on all ranks.

        Every rank calls it at the same boundary. `digest` is called when that packet is sent.
        """
        self._digest = digest
        self._verdict = None

    def take_verdict(self) -> bool | None:
        """Returns whether the number of `compare` was the same on all ranks, once: None until the
        packet is read, at the same boundary on all ranks."""
        verdict = self._verdict
        self._verdict = None
        return verdict

    def name_culprit(self, step: int) -> None:
        """Notes that this rank's loss of `step` was not finite; -1: none was."""
        self._culprit_step = step

    def boundary(self, *, stop: int = 0, saves: bool = False) -> Decision:
        """Reads the packet that is due and sends the next one.

        Args: `stop` why this rank would stop, 0: it would not; `saves` a save is due on this rank.
        Returns: an empty decision where nothing was due.
        """
        is_meeting = self.boundaries.pass_one()
        if is_meeting:
            return self.exchange(stop=stop)
        if self.boundaries.position < self._next:
            return NOTHING
        pulse = self._group.pulse
        phase = pulse.phase
        # An evaluation stays one.
        if phase is Phase.CALLBACK:
            pulse.mark(Phase.CONTROL)
        decision = self._read()
        if phase is Phase.CALLBACK:
            pulse.mark(phase)
        step_s = int(self._packet[Field.STEP_US]) / 1e6
        interval = _interval(step_s)
        if self._is_new_kind or self._group.world_size == 1:
            # One process has nobody to wait for.
            interval = 1
        if step_s and not self._is_new_kind:
            self._step_s[self._kind] = step_s
        self._is_new_kind = False
        # A save that was just decided is about to be done.
        self._send(stop=stop, saves=saves and not decision.saves)
        self._next = self.boundaries.position + interval
        return decision

    @property
    def is_due_next(self) -> bool:
        """Whether a packet is sent at the next boundary anyhow. Any thread may ask."""
        return self._next <= self.boundaries.position + 1

    def begin_kind(self, kind: str) -> None:
        """Tells that the boundaries to come are of another kind, whose length is not known yet.

        Every rank calls it.
        """
        self._kind = kind
        self._is_new_kind = True
        self._next = 0
        self._last = (self.boundaries.position, time.perf_counter())

    def exchange(self, *, stop: int = 0) -> Decision:
        """Sends and reads at once, and returns the decision.

        It is for moments that all ranks reach together, such as a step that was not applied. Every
        rank calls it.
        """
        self._read()
        self._send(stop=stop)
        return self._read()

    @property
    def in_flight(self) -> dist.Work | None:
        """The packet on its way, to be waited for before what was sent after it.

        Once a sum has failed unread, because a peer is lost, gloo lets later ones of the same group
        wait until their timeout.
        """
        return self._work

    def close(self) -> None:
        """Completes the packet in flight, so that no rank leaves another waiting."""
        self._read()

    def agreement_s(self) -> tuple[float, float]:
        """Returns how long a stop waits at most, in seconds.

        First for the end of a step, and then for all ranks to know of it: it is sent at the next
        packet and read at the one after.
        """
        waits = [(step_s, 2 * _interval(step_s) * step_s) for step_s in self._step_s.values()]
        return max(waits, key=sum, default=(0.0, 0.0))

    def _send(self, *, stop: int, saves: bool = False) -> None:
        now = time.perf_counter()
        position, then = self._last
        steps = self.boundaries.position - position
        self._last = (self.boundaries.position, now)
        self._packet[Field.STOP] = self._with_rank(stop)
        self._packet[Field.CULPRIT] = self._with_rank(self._culprit_step + 1)
        self._packet[Field.STEP_US] = int((now - then) / steps * 1e6) if steps > 0 else 0
        self._packet[Field.SAVE] = int(saves)
        digest = 0
        if self._digest is not None:
            digest = self._digest() + 1
            self._digest = None
        self._packet[Field.DIGEST] = digest
        self._packet[Field.AGAINST] = -digest
        if self._group.control_pg is not None and self._group.world_size > 1:
            self._work = dist.all_reduce(
                self._packet, dist.ReduceOp.MAX, group=self._group.control_pg, async_op=True
            )

    def _with_rank(self, value: int) -> int:
        """Returns the field that names this rank beside a value, 0 where the value is 0."""
        if not value:
            return 0
        return (value << SHIFT) + self._group.rank

    def _read(self) -> Decision:
        if self._work is not None:
            self._work.wait()
            self._work = None
            if self._packet[Field.DIGEST]:
                self._verdict = bool(self._packet[Field.DIGEST] == -self._packet[Field.AGAINST])
        stop, culprit, _, saves, _, _ = self._packet.tolist()
        return Decision(
            stop=stop >> SHIFT,
            stop_rank=stop & RANK_MASK if stop else -1,
            culprit_step=(culprit >> SHIFT) - 1,
            culprit_rank=culprit & RANK_MASK if culprit else -1,
            saves=bool(saves),
        )


def _interval(step_s: float) -> int:
    """Returns how many steps of this length lie between two packets."""
    if step_s <= 0:
        return 1
    return max(1, min(MOST_STEPS, math.floor(INTERVAL_S / step_s)))
