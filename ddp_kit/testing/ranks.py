"""The ranks of one test, from the side of the pytest process.

They are started, watched and killed here, at their deadline at the latest. Whoever opens Ranks
closes it.
"""

import pickle
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ddp_kit.testing.job import Job, pack
from ddp_kit.testing.pool import Pool
from ddp_kit.testing.rank import STACKS
from ddp_kit.testing.report import RankReport, RanksError, death

GRACE_S = 5.0  # for the peers of a rank that has failed
END_S = 30.0  # for a killed process to disappear
HERE = f'File "{Path(__file__).parent}'  # lines of stacks that are the kit's, not the test's
BOOT = 'File "<string>", line 1 in <module>'


class Ranks:
    """The ranks of one test while they run. Leaving the `with` block kills those that are left."""

    def __init__(self, job: Job) -> None:
        # The session's pool; outside pytest these ranks have a server of their own.
        shared = Pool.current.get(None)
        self.pool = shared or Pool()
        self.owns_pool = shared is None
        self.deadline_s = job.deadline_s
        self.files, self.pids = self.pool.fork(job)
        self.deadline = time.monotonic() + job.deadline_s
        self.stacks: dict[int, str] = {}

    @property
    def living(self) -> list[int]:
        """The ranks that have not ended, as far as is known."""
        return [rank for rank, pid in enumerate(self.pids) if pid not in self.pool.ended]

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Sends a signal to one rank; nothing happens if it has ended."""
        self.pool.signal(self.pids[rank], number)

    def wait(self, *, grace_s: float | None = None) -> list[RankReport]:
        """Waits until all ranks have ended, and kills at the deadline those that have not.

        Args: `grace_s` shortens the deadline to so many seconds after the first failure of a rank;
            None leaves it.
        Returns: a report of each rank.
        """
        end = self.deadline
        is_shortened = grace_s is None
        while self.living and time.monotonic() < end:
            if grace_s is not None and not is_shortened and self._has_failed():
                end = min(end, time.monotonic() + grace_s)
                is_shortened = True
            self.pool.receive(end - time.monotonic())
        late = self.living
        self._dump(late)
        self._kill(late)
        return [self._report(rank, is_late=rank in late) for rank in range(len(self.pids))]

    def values(self) -> list[Any]:
        """Waits for all ranks.

        Returns: what the function returned on each, in rank order.
        Raises: RanksError if one failed or was late, with the culprit's traceback first.
        """
        reports = self.wait(grace_s=GRACE_S)
        if any(report.outcome != "passed" for report in reports):
            raise RanksError(reports, deadline_s=self.deadline_s)
        return [pickle.loads(report.value) for report in reports]

    def close(self) -> None:
        """Kills the ranks that are left and removes their files."""
        # The ranks of a server that has ended have died with it.
        if self.pool.is_alive:
            self._kill(self.living)
        shutil.rmtree(self.files.folder, ignore_errors=True)
        if self.owns_pool:
            self.pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _has_failed(self) -> bool:
        return any(pid in self.pool.ended and self.pool.ended[pid][0] for pid in self.pids)

    def _dump(self, ranks: Sequence[int]) -> None:
        """Lets ranks write their stacks, and waits until these grow no more.

        A C signal handler writes them, so a rank blocked in a collective answers too; a stopped one
        does not.
        """
        for rank in ranks:
            self.pool.signal(self.pids[rank], STACKS)
        end = time.monotonic() + 2
        for rank in ranks:
            file = self.files.stacks(rank)
            size = -1
            while time.monotonic() < end and (size < 1 or file.stat().st_size != size):
                size = 0
                if file.exists():
                    size = file.stat().st_size
                time.sleep(0.05)

    def _kill(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self.kill(rank)
        end = time.monotonic() + END_S
        while any(self.pids[rank] not in self.pool.ended for rank in ranks):
            if self.pool.receive(end - time.monotonic()) is None:
                break

    def _report(self, rank: int, *, is_late: bool) -> RankReport:
        code, ended = self.pool.ended.get(self.pids[rank], (-signal.SIGKILL, time.monotonic()))
        found = self.files.report(rank)
        if found.exists():
            report: RankReport = pickle.loads(found.read_bytes())
        elif is_late:
            report = RankReport(
                rank=rank,
                outcome="late",
                time=ended,
                exit_code=code,
                message="was still running, and was killed",
            )
        else:
            report = RankReport(
                rank=rank, outcome="died", time=ended, exit_code=code, message=death(code)
            )
        lines = _text(self.files.stacks(rank)).splitlines(keepends=True)
        stacks = "".join(line for line in lines if HERE not in line and BOOT not in line)
        output = _text(self.files.output(rank))
        return replace(report, pid=self.pids[rank], output=output, stacks=stacks)


def _text(file: Path) -> str:
    if not file.exists():
        return ""
    return file.read_text(errors="replace")


def start_ranks(
    function: Callable[..., object],
    world_size: int,
    *args: object,
    deadline_s: float = 60,
    env: Mapping[str, str | None] | None = None,
    group: bool = True,
) -> Ranks:
    """Starts `function(*args)` on `world_size` ranks and returns at once; use it in a `with` block.

    Args: `function` is at the top level of a module, `args` pickle; `deadline_s` seconds later the
        ranks that are left are killed; `env` changes variables of the ranks (None unsets);
        `group=False` leaves the process group to the function, which finds torchrun's variables
        set.
    Raises: TypeError if something cannot be sent to the ranks, ValueError if `world_size` is not at
        least 1.
    """
    job = Job(
        call=pack(function, *args),
        world_size=world_size,
        has_group=group,
        deadline_s=deadline_s,
        changes=env or {},
    )
    return Ranks(job)


def run_ranks(
    function: Callable[..., object],
    world_size: int,
    *args: object,
    deadline_s: float = 60,
    env: Mapping[str, str | None] | None = None,
    group: bool = True,
) -> list[Any]:
    """Runs `function(*args)` on `world_size` ranks. The arguments are those of `start_ranks`.

    Returns: what the function returned on each rank, in rank order.
    Raises: RanksError if a rank failed, died or was late; what `start_ranks` raises.
    """
    started = start_ranks(function, world_size, *args, deadline_s=deadline_s, env=env, group=group)
    with started as ranks:
        return ranks.values()
