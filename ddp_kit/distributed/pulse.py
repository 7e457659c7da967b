"""What this rank's main thread is doing, and since when, for whoever watches from another thread.

The main thread marks each phase as it enters it: a few plain writes, below a microsecond. Nothing
is decided here: `ddp_kit.watchdog` tells a rank that hangs from one that waits, and the records how
long each rank took for its own work.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from ddp_kit.io.pulse_file import LIMITS_MS, MARKS, PART, PHASE, STEP, no_file

# Of a step's parts: those of its passes are counted from the last one backwards, since ranks may
# have different numbers of them, and what comes after the passes is counted on from here.
PASSES = 1 << 20
AFTER_STEP = 1 << 40


class Phase(IntEnum):
    """What the main thread does, in the order in which a step has it."""

    START = 0
    DATA = 1
    FORWARD = 2
    BACKWARD = 3
    REDUCE = 4
    OPTIMIZER = 5
    CONTROL = 6
    CALLBACK = 7
    EVALUATION = 8
    SAVE = 9
    END = 10


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Seconds without any progress in a phase after which a rank is taken to hang.

    `step` 0: `FACTOR` times the slowest step so far, and at least `LEAST_S`.
    """

    step: float = 0.0
    start: float = 1800.0
    first_step: float = 600.0
    callback: float = 600.0
    evaluation: float = 1800.0
    save: float = 1800.0
    end: float = 1800.0
    # A step may be compiled anew at any time: then each has the time of the first one.
    compiles: bool = False
    is_on: bool = True

    @property
    def longest(self) -> float:
        """The longest of them, that of a step of automatic length left aside."""
        return max(
            self.step,
            self.start,
            self.first_step,
            self.callback,
            self.evaluation,
            self.save,
            self.end,
        )


FACTOR = 10.0
LEAST_S = 60.0


class Pulse:
    """One rank's marks. The main thread writes them, any thread may read them.

    `part` counts on within a step; `marks` with each mark and each sign of progress. `own_s` sums
    the time in each phase.
    """

    def __init__(self) -> None:
        self.phase = Phase.START
        self.step = 0
        self.part = 0
        self.marks = 0
        self.since = time.monotonic()
        self.own_s = [0.0] * len(Phase)
        # The place again, for other processes of the host once there is a watchdog.
        self.numbers = no_file()
        self.limits = Limits()
        # Steps that are done, and the slowest of them but the first, which compiles.
        self.steps = 0
        self.slowest_s = 0.0
        self._began = self.since
        # Told of what the main thread waits for, where somebody knows: a loader worker.
        self.waits_for: Callable[[], str] | None = None
        # Where a run keeps stacks, and what it does with a verdict (text, rank).
        self.stacks: Path | None = None
        self.on_verdict: Callable[[str, int], None] | None = None

    def mark(self, phase: Phase) -> None:
        """Enters a phase."""
        now = time.monotonic()
        self.own_s[self.phase] += now - self.since
        self.since = now
        self.phase = phase
        self.marks += 1
        numbers = self.numbers
        numbers[PHASE] = phase
        numbers[PART] = self.part
        numbers[MARKS] = self.marks

    def begin_step(self, step: int) -> None:
        """Enters the wait for the data of a step; the first one is 1."""
        self.step = step
        self.numbers[STEP] = step
        self.part = 0
        self.mark(Phase.DATA)
        self._began = self.since

    def begin_pass(self, objective: int, *, left: int) -> None:
        """Enters a forward pass, after which `left` are still to come of an objective."""
        self.part = (objective + 1) * PASSES - left
        self.mark(Phase.FORWARD)

    def end_step(self) -> None:
        """Enters what a loop does between two steps."""
        self.part = AFTER_STEP
        self.mark(Phase.CALLBACK)
        took_s = self.since - self._began
        if self.steps and took_s > self.slowest_s:
            self.slowest_s = took_s
        self.steps += 1
        if self.steps == 1:
            self.tell_limits()

    def beat(self) -> None:
        """Gets on within a phase: one micro-batch of an evaluation is done."""
        self.part += 1
        self.mark(self.phase)

    def go_on(self, phase: Phase) -> None:
        """Enters a phase that comes after the one before in this step, whatever their order."""
        self.part += 1
        self.mark(phase)

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Is in a phase while it lasts, and then in the one before again."""
        before = self.phase
        self.go_on(phase)
        try:
            yield
        finally:
            self.go_on(before)

    def tell_limits(self) -> None:
        """Tells other processes how long each phase may last, as of now."""
        for phase in Phase:
            self.numbers[LIMITS_MS + phase] = int(1000 * self.limit_of(phase))

    def finish(self, step: int) -> None:
        """Enters the end of a run, after `step` steps."""
        self.step = step
        self.numbers[STEP] = step
        self.part = 2 * AFTER_STEP
        self.mark(Phase.END)

    @property
    def limit_s(self) -> float:
        """Seconds that the phase may go without progress."""
        return self.limit_of(self.phase)

    def limit_of(self, phase: Phase) -> float:
        """Returns the seconds that a phase may go without progress, as of now."""
        limits = self.limits
        of_phase = {
            Phase.START: limits.start,
            Phase.CALLBACK: limits.callback,
            Phase.EVALUATION: limits.evaluation,
            Phase.SAVE: limits.save,
            Phase.END: limits.end,
        }
        if phase in of_phase:
            return of_phase[phase]
        limit = limits.step or max(LEAST_S, FACTOR * self.slowest_s)
        if not self.steps or limits.compiles:
            return max(limit, limits.first_step)
        return limit
