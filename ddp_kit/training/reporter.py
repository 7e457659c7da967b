"""What a run says while it trains: records for metrics.jsonl, events, and who receives them.

The sum of a step's loss over ranks is launched at one boundary and read at the next. Records go out
in bursts: between short steps a record costs three times what it costs after another one. There is
no branch on rank: only rank 0 is given trackers, the others have none.
"""

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ddp_kit.distributed.collectives import same_everywhere
from ddp_kit.errors import DdpKitError
from ddp_kit.io.logs import logger
from ddp_kit.trackers.base import RunInfo, Tracker
from ddp_kit.training.state import StepSums, Training
from ddp_kit.training.step_record import (
    LossesSince,
    StepRecord,
    launch_sums,
    learning_rates,
    loss_scales,
)

BURST_S = 0.1  # how long a record may wait for others
ALWAYS = "Every micro-batch must report every metric: one that does not occur in it as (0, 0)."


class Reporter:
    """Hands records to the trackers.

    Every rank calls it alike; ranks without trackers only take part in the sums.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        *,
        log_every: int,
        peak_rate: float = 0.0,
        progress: Sequence[Callable[[int], None]] = (),
        on_burst: Sequence[Callable[[], None]] = (),
    ):
        """Starts nothing yet.

        Args:
            log_every: a record every so many steps.
            peak_rate: in samples/s, of which `mfu` is the share (0: not known).
            progress: called with the step after each step; must be cheap.
            on_burst: called after records have gone out.
        """
        self._given = trackers
        self._log_every = log_every
        self._peak_rate = peak_rate
        self._progress = progress
        self._on_burst = on_burst
        # Those that have started: only they may be told of a failure.
        self._trackers: list[Tracker] = []
        self._pending: StepRecord | None = None
        self._arrived: list[StepRecord] = []
        self._last_burst = 0.0
        self._names: list[str] = []
        self._losses = LossesSince()
        self.restart_clock(0)
        # When the peak memory was asked for, and the answer.
        self._peak_asked_at = 0.0
        self._peak_mib = 0.0

    def start(self, info: RunInfo, *, step: int) -> None:
        """Starts the trackers and the clock."""
        for tracker in self._given:
            tracker.start(info)
            self._trackers.append(tracker)
        self.restart_clock(step)

    def restart_clock(self, step: int) -> None:
        """Begins a new interval for rates, so that an evaluation's time is not counted as
        training."""
        self._since_step = step
        self._since_time = time.perf_counter()
        self._wait_s = 0.0

    def go_back(self, step: int) -> None:
        """Forgets what the records to come would tell of the steps after a checkpoint, which come
        again. Every rank calls it, once all is flushed."""
        self._losses = LossesSince()
        self.restart_clock(step)

    def step(
        self, training: Training, sums: StepSums, *, epoch: int, wait_s: float, is_last: bool
    ) -> None:
        """Takes a finished step: emits the record that is due from an earlier one, and begins one
        every `log_every` steps.

        Raises: DdpKitError if micro-batches or ranks report different metrics.
        """
        self._wait_s += wait_s
        if not sums.is_dropped:
            self._losses.take(sums)
        for progress in self._progress:
            progress(training.step)
        self._receive()
        if self._arrived and time.perf_counter() - self._last_burst > BURST_S:
            self._emit()
        self.tell_dropped(training)
        is_due = training.step % self._log_every == 0 or is_last
        if is_due and not sums.is_dropped:
            self._begin(training, sums, epoch=epoch)

    def _begin(self, training: Training, sums: StepSums, *, epoch: int) -> None:
        """Begins a record: its sums over ranks set out."""
        now = time.perf_counter()
        step = training.step
        samples = training.cursor.samples(step, global_batch=training.plan.global_batch)
        head = {"kind": "train", "step": step, "epoch": epoch, "samples": samples}
        names = self._agreed(sums.names(), training) + self._losses.names()
        rows = [{**own, **mean} for own, mean in zip(sums.rows(), self._losses.rows(), strict=True)]
        on_the_way = launch_sums(training, rows, names, first=sums.first)
        tail = learning_rates(sums) | self._rates(training, now)
        tail["peak_memory_mib"] = self._peak(now, training.group.device)
        tail |= loss_scales(training)
        self._pending = StepRecord(head, tail, names, on_the_way, dict(sums.grad_norms))
        self._since_step = step
        self._since_time = now
        self._wait_s = 0.0

    def _rates(self, training: Training, now: float) -> dict[str, float]:
        """Returns what a record says of the speed since the last one."""
        seconds = max(now - self._since_time, 1e-9)
        samples = (training.step - self._since_step) * training.plan.global_batch
        rates = {"samples_per_s": samples / seconds, "data_wait": self._wait_s / seconds}
        if self._peak_rate:
            rates["mfu"] = rates["samples_per_s"] / self._peak_rate
        return rates

    def _peak(self, now: float, device: torch.device) -> float:
        """Returns the peak memory, asked for once a second: the system's answer takes 20
        microseconds."""
        if now - self._peak_asked_at > 1:
            self._peak_asked_at = now
            self._peak_mib = peak_memory_mib(device)
        return self._peak_mib

    def _agreed(self, names: list[str], training: Training) -> list[str]:
        """Returns the names of a record's sums, which are those of the first record on all ranks.

        Raises: DdpKitError if a batch has others: sums under different names would be added up.
        """
        if not self._names:
            if not same_everywhere(training.group, names):
                raise DdpKitError(
                    f"the ranks' losses report different metrics; rank {training.group.rank} has "
                    f"{', '.join(names)}. {ALWAYS}"
                )
            self._names = names
        if names != self._names:
            raise DdpKitError(
                f"the loss reports {', '.join(names)}, where it reported "
                f"{', '.join(self._names)} before. {ALWAYS}"
            )
        return names

    def flush(self) -> None:
        """Emits all records, that whose sums are on their way too.

        Every rank calls it before evaluations and saves, and at the end: a checkpoint that follows
        may be the last thing that this attempt does.
        """
        self._receive()
        self._emit()

    def _receive(self) -> None:
        """Waits for the sums on their way: one step after they set out, so that none is unread if a
        later sum fails."""
        pending = self._pending
        if pending is None:
            return
        self._pending = None
        pending.sums.wait()
        if self._trackers:
            self._arrived.append(pending)

    def _emit(self) -> None:
        arrived = self._arrived
        self._arrived = []
        for pending in arrived:
            self.log(pending.read())
        for call in self._on_burst:
            call()
        self._last_burst = time.perf_counter()

    def log(self, record: Mapping[str, Any]) -> None:
        """Hands a record of metrics.jsonl to every tracker."""
        for tracker in self._trackers:
            tracker.log(record)

    def event(
        self,
        event: str,
        *,
        step: int,
        rank: int = 0,
        message: str = "",
        about: Mapping[str, object] | None = None,
    ) -> None:
        """Hands a record of events.jsonl to every tracker; `about` are further fields of it."""
        self._emit()  # in the order in which things happened
        record: dict[str, object] = {
            "event": event,
            "step": step,
            "rank": rank,
            "time": round(time.time(), 3),
        }
        if message:
            record["message"] = message
        record |= about or {}
        for tracker in self._trackers:
            tracker.event(record)

    def tell_dropped(self, training: Training) -> None:
        """Tells of the steps that were dropped since the last call. Every rank calls it."""
        for told in training.bad_steps.take_told():
            fault = told.fault
            logger.warning("%s", told.message)
            self.event(
                fault.kind,
                step=fault.step,
                rank=max(fault.rank, 0),
                message=told.message,
                about=fault.about,
            )

    def samples(self, values: Mapping[str, Any], *, step: int) -> None:
        """Hands texts and images to every tracker."""
        for tracker in self._trackers:
            for name, value in values.items():
                tracker.sample(name, value, step=step)

    def finish(self, status: Mapping[str, Any]) -> None:
        """Closes the trackers with the content of status.json. A save that ends later is not told
        to them any more."""
        trackers = self._trackers
        self._trackers = []
        for tracker in trackers:
            tracker.finish(status)


def peak_memory_mib(device: torch.device) -> float:
    """Returns the peak memory of this rank: allocated by torch on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, Linux KiB.
    per_mib = 2**20 if sys.platform == "darwin" else 2**10
    return round(peak / per_mib, 1)
