"""What a run says while it trains: records for metrics.jsonl, events, and who receives them.

Owns: the form of a record, the sum of a step's loss over ranks (launched at one boundary, read at the next), and the fan-out, in bursts:
between short steps a record costs three times what it costs after another one.
Refuses: branching on rank: only rank 0 is given trackers, the others have none.
"""

import resource
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ddp_kit.distributed.collectives import first_difference
from ddp_kit.errors import DdpKitError
from ddp_kit.metrics import means
from ddp_kit.trackers.base import RunInfo, Tracker
from ddp_kit.training.state import StepSums, Training

BURST_S = 0.1  # how long a record may wait for others
ALWAYS = "Every micro-batch must report every metric: one that does not occur in it as (0, 0)."


@dataclass
class _Pending:
    """A train record whose sums are on their way."""

    head: dict[str, Any]
    tail: dict[str, Any]
    names: list[str]
    sums: torch.Tensor | list[list[list[float]]]  # [micro-batch of all ranks][name] -> (sum, count)
    works: "Sequence[dist.Work | None]"  # to be waited for in this order
    norms: Mapping[str, torch.Tensor]


class Reporter:
    """Hands records to the trackers. Every rank calls it alike; ranks without trackers only take part in the sums."""

    def __init__(
        self,
        trackers: Sequence[Tracker],
        *,
        log_every: int,
        peak_rate: float = 0.0,
        progress: Sequence[Callable[[int], None]] = (),
        on_burst: Sequence[Callable[[], None]] = (),
    ):
        """Args: `peak_rate` in samples/s, of which `mfu` is the share (0: not known); `progress` are called with the step after each
        step, and must be cheap; `on_burst` after records have gone out."""
        self._given, self._log_every, self._progress, self._on_burst = (
            trackers,
            log_every,
            progress,
            on_burst,
        )
        self._peak_rate = peak_rate
        self._trackers: list[
            Tracker
        ] = []  # those that have started: only they may be told of a failure
        self._pending: _Pending | None = None
        self._arrived: list[_Pending] = []
        self._burst = 0.0  # when the last one was
        self._names: list[str] = []
        self._since = (0, time.perf_counter())
        self._wait_s = 0.0
        self._asked = (0.0, 0.0)  # when for the peak memory, and the answer

    def start(self, info: RunInfo, *, step: int) -> None:
        """Starts the trackers and the clock."""
        for tracker in self._given:
            tracker.start(info)
            self._trackers.append(tracker)
        self.restart_clock(step)

    def restart_clock(self, step: int) -> None:
        """Begins a new interval for rates, so that an evaluation's time is not counted as training."""
        self._since, self._wait_s = (step, time.perf_counter()), 0.0

    def step(
        self, training: Training, sums: StepSums, *, epoch: int, wait_s: float, is_last: bool
    ) -> None:
        """Takes a finished step: emits the record that is due from an earlier one, and begins one every `log_every` steps."""
        self._wait_s += wait_s
        for progress in self._progress:
            progress(training.step)
        self._receive()
        if self._arrived and time.perf_counter() - self._burst > BURST_S:
            self._emit()
        if training.step % self._log_every == 0 or is_last:
            self._begin(training, sums, epoch=epoch)

    def _begin(self, training: Training, sums: StepSums, *, epoch: int) -> None:
        now = time.perf_counter()
        seconds = max(now - self._since[1], 1e-9)
        step, plan, device = training.step, training.plan, training.group.device
        head = {"kind": "train", "step": step, "epoch": epoch, "samples": step * plan.global_batch}
        totals = sums.totals(device)
        names = self._agreed(
            sorted({prefix + name for prefix, part in sums.parts for name in part}), training
        )
        works: list[dist.Work | None] = []
        values: torch.Tensor | list[list[list[float]]]
        # Not beside DDP's own: after a collective that failed unread, gloo lets a later one of the same group wait until its timeout.
        group = training.group.training if device.type == "cuda" else training.group.control
        if group is None and device.type == "cpu":
            values = totals.rows(names)
        else:
            values = torch.zeros(
                plan.micro_batches, len(names), 2, dtype=torch.float64, device=device
            )
            values[sums.first : sums.first + sums.size] = totals.tensor(
                names
            )  # x + 0 is exact, and the slots are summed in order
            if group is not None:  # beside the packet that went before it in the same group
                works = [training.control.in_flight if group is training.group.control else None]
                works.append(dist.all_reduce(values, group=group, async_op=True))
        rates = {
            "samples_per_s": (step - self._since[0]) * plan.global_batch / seconds,
            "data_wait": self._wait_s / seconds,
        }
        rates |= {"mfu": rates["samples_per_s"] / self._peak_rate} if self._peak_rate else {}
        tail = learning_rates(sums) | rates | {"peak_memory_mib": self._peak(now, device)}
        if training.objectives[0].scale.is_on:
            tail |= {"loss_scale": training.objectives[0].scale.scale, "skipped": training.skipped}
        self._pending = _Pending(head, tail, names, values, works, dict(sums.grad_norms))
        self._since, self._wait_s = (step, now), 0.0

    def _peak(self, now: float, device: torch.device) -> float:
        """Returns the peak memory, asked for once a second: 20 microseconds for the system's answer."""
        if now - self._asked[0] > 1:
            self._asked = (now, peak_memory_mib(device))
        return self._asked[1]

    def _agreed(self, names: list[str], training: Training) -> list[str]:
        """Returns the names of a record's sums, which are those of the first record on all ranks.

        Raises: DdpKitError if a batch has others: sums under different names would be added up.
        """
        if not self._names:
            signature = zlib.crc32("\n".join(names).encode())
            if first_difference(training.group, [signature]) is not None:
                raise DdpKitError(
                    f"the ranks' losses report different metrics; rank {training.group.rank} has {', '.join(names)}. {ALWAYS}"
                )
            self._names = names
        if names != self._names:
            raise DdpKitError(
                f"the loss reports {', '.join(names)}, where it reported {', '.join(self._names)} before. {ALWAYS}"
            )
        return names

    def flush(self) -> None:
        """Emits all records, that whose sums are on their way too. Every rank calls it before evaluations and saves, and at the end: a
        checkpoint that follows may be the last thing that this life does."""
        self._receive()
        self._emit()

    def _receive(self) -> None:
        """Waits for the sums on their way: one step after they set out, so that none is unread if a later sum fails."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        for work in pending.works:
            if work is not None:
                work.wait()
        if self._trackers:
            self._arrived.append(pending)

    def _emit(self) -> None:
        arrived, self._arrived = self._arrived, []
        for pending in arrived:
            rows = (
                pending.sums.tolist() if isinstance(pending.sums, torch.Tensor) else pending.sums
            )  # host-device sync., steps late
            found = means(
                {
                    name: [sum(row[i][k] for row in rows) for k in (0, 1)]
                    for i, name in enumerate(pending.names)
                }
            )
            norms = {f"{name}grad_norm": float(norm) for name, norm in pending.norms.items()}
            self.log({**pending.head, **found, **norms, **pending.tail})
        for lets_go in self._on_burst:
            lets_go()
        self._burst = time.perf_counter()

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
        record |= ({"message": message} if message else {}) | dict(about or {})
        for tracker in self._trackers:
            tracker.event(record)

    def samples(self, values: Mapping[str, Any], *, step: int) -> None:
        """Hands texts and images to every tracker."""
        for tracker in self._trackers:
            for name, value in values.items():
                tracker.sample(name, value, step=step)

    def finish(self, status: Mapping[str, Any]) -> None:
        """Closes the trackers with the content of status.json. A save that ends later is not told to them any more."""
        trackers = self._trackers
        self._trackers = []
        for tracker in trackers:
            tracker.finish(status)


def learning_rates(sums: StepSums) -> dict[str, float]:
    """Returns `lr`, and with several parameter groups `lr/0`, `lr/1`, ..., under each objective's name."""
    rates = {"lr": float(next(iter(sums.rates.values()))[0])}
    for name, groups in sums.rates.items():
        rates[f"{name}lr"] = float(groups[0])
        if len(groups) > 1:
            rates |= {f"{name}lr/{i}": float(rate) for i, rate in enumerate(groups)}
    return rates


def peak_memory_mib(device: torch.device) -> float:
    """Returns the peak memory of this rank: allocated by torch on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
