"""What the ranks of one test report, and how it becomes one message with the culprit first."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """How one rank ended.

    `outcome` is passed, skipped, xfailed, failed (an exception), died (ended without a word: signal
    or `os._exit`) or late (did not end and was killed). `exit_code` is negative for a signal.
    `time` is the monotonic time of the exception or death in seconds; `is_echo` whether the
    exception only says that a peer has gone. `value` is the pickled return value.
    """

    rank: int
    outcome: str
    pid: int = 0
    time: float = 0.0
    value: bytes = b""
    exit_code: int = 0
    message: str = ""
    traceback: str = ""
    where: tuple[str, int] | None = None
    is_echo: bool = False
    stacks: str = ""
    output: str = ""

    @property
    def line(self) -> str:
        """One line for a rank that is not the culprit."""
        if not self.first_line:
            return f"rank {self.rank} {self.outcome}"
        return f"rank {self.rank} {self.outcome}: {self.first_line}"

    @property
    def first_line(self) -> str:
        """The first line of the message."""
        return self.message.strip().partition("\n")[0]


class RanksError(Exception):
    """At least one rank failed.

    `reports` holds one RankReport for each rank, `culprit` is the rank that failed first, None if
    all were late.
    """

    def __init__(self, reports: Sequence[RankReport], *, deadline_s: float) -> None:
        self.reports = tuple(reports)
        self.first_failed = _first_failed(reports)
        self.culprit: int | None = None
        if self.first_failed is not None:
            self.culprit = self.first_failed.rank
        self.merged = _merged(reports, first_failed=self.first_failed, deadline_s=deadline_s)
        text = self.merged
        for report in reports:
            if report.output.strip():
                text += f"\n--- output of rank {report.rank} ---\n{report.output.rstrip()}"
        super().__init__(text)

    @property
    def headline(self) -> str:
        """One line for pytest's summary."""
        if self.first_failed is None:
            return "the ranks were not done before the deadline"
        return f"rank {self.first_failed.rank}: {self.first_failed.first_line}"


def death(exit_code: int) -> str:
    """Words an exit code as `subprocess` has it: negative is a signal."""
    if exit_code >= 0:
        return f"ended by itself with exit code {exit_code} before the test was over"
    return f"killed by {signal.Signals(-exit_code).name}"


def _first_failed(reports: Sequence[RankReport]) -> RankReport | None:
    """Returns the report of the rank that failed first, None if there is none.

    Ranks that are only late are all innocent, or all guilty.
    """
    failed = [report for report in reports if report.outcome not in ("passed", "late")]
    return min(failed, key=_guilt, default=None)


def _guilt(report: RankReport) -> tuple[bool, bool, float]:
    """Returns what is least for the rank that failed first.

    A killed rank has nobody to note the time of its death, so its peers' "connection closed" may
    come first: echoes go last. A rank that skips alone makes echoes too.
    """
    return report.is_echo, report.outcome not in ("failed", "died"), report.time


def _merged(
    reports: Sequence[RankReport], *, first_failed: RankReport | None, deadline_s: float
) -> str:
    parts = []
    if first_failed is None:
        parts.append(
            f"Not done after {deadline_s:g} s (deadline_s of the test). "
            "Where the ranks were, innermost call first:"
        )
    elif first_failed.outcome in ("skipped", "xfailed"):
        outcome = f"{first_failed.outcome} ({first_failed.message})"
        parts.append(
            f"Rank {first_failed.rank} of {len(reports)} was {outcome}; "
            "all ranks have to be, or none."
        )
    else:
        message = first_failed.message
        # A traceback has all of the message at its end.
        if first_failed.traceback:
            message = first_failed.first_line
        parts.append(f"Rank {first_failed.rank} of {len(reports)} failed first: {message}")
        details = (first_failed.traceback, first_failed.stacks)
        parts += [text.rstrip() for text in details if text.strip()]
    others = [report for report in reports if report is not first_failed]
    if others:
        parts.append("\n".join(f"  {report.line}" for report in others))
    for report in others:
        if report.stacks.strip():
            head = f"Stacks of rank {report.rank} (pid {report.pid})"
            parts.append(f"{head}:\n{report.stacks.rstrip()}")
    return "\n\n".join(parts)
