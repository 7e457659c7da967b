"""`ddp-kit logs RUN [--rank K] [-f]`: what a run has said, over all its lives.

Owns: the order of lines: the job's own and the ranks' by their time, with what the ranks' tasks left on stdout and stderr, each once.
Refuses: changing anything.
"""

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from ddp_kit.launch.plan import LaunchError, answered
from ddp_kit.launch.runs.found import FoundRun, find

POLL_S = 0.5
ASK_S = 4.0  # between two looks at whether a run is over; it is when two say so, since torchrun may begin its ranks anew
ALIKE_S = 2.0  # between ranks that say the same
RANK_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")  # of a rank's log, local time
LEVEL = re.compile(r"[A-Z]+ ")  # after it
SUBMITITS = re.compile(
    r"submitit [A-Z]+ \((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})\) - "
)  # its lines in a task's stdout
JOB_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} ")  # of a batch script


class Line(NamedTuple):
    """A line of a log: when it was written, in seconds of the epoch, and by whom."""

    time: float
    label: str
    text: str


@dataclass
class Source:
    """A file that grows. `label` says whose lines they are."""

    path: Path
    label: str
    at: int = 0
    time: float = 0.0  # of the line before; a line without one belongs to it
    rest: bytes = field(default=b"", repr=False)

    def lines(self) -> Iterator[Line]:
        """Yields what has been added since the last call; a line that is still being written is left."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.at)
                added = file.read()
                changed = self.path.stat().st_mtime
        except OSError:
            return
        self.at += len(added)
        *whole, self.rest = (self.rest + added).split(b"\n")
        for raw in whole:
            line = raw.decode(errors="replace")
            self.time = _time(line) or self.time
            yield Line(self.time or changed, self.label, line)


def _time(line: str) -> float:
    if match := RANK_TIME.match(line):
        return datetime.strptime(match[0].strip(), "%Y-%m-%d %H:%M:%S,%f").timestamp()
    if match := SUBMITITS.match(line):
        return datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
    if match := JOB_TIME.match(line):
        return datetime.strptime(match[0].strip(), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return 0.0


def sources(run: FoundRun, *, rank: int | None) -> list[tuple[Path, str]]:
    """Returns the files that a run has now, and whose lines they are: the jobs' own, what tasks have printed, the ranks' logs.

    The logs come last: they are read last, and so hold whatever a task's stdout repeats.
    """
    found: list[tuple[Path, str]] = []
    for submission in run.submissions():
        folder, job = Path(str(submission["folder"])), str(submission["job"])
        found.append((folder / f"{job}.log", "job"))
        for kind, name in (("err", "stderr"), ("out", "stdout")):
            found += [
                (path, f"task {path.name.split('_')[-2]} {name}")
                for path in sorted(folder.glob(f"{job}_*_log.{kind}"))
            ]
    logs = sorted(
        (run.folder / "logs").glob("rank-*.log"), key=lambda path: int(path.stem.split("-")[1])
    )
    found += [(path, f"rank {path.stem.split('-')[1]}") for path in logs]
    asked = (f"rank {rank}", f"task {rank} stderr", f"task {rank} stdout")
    return [
        (path, label) for path, label in found if path.exists() and (rank is None or label in asked)
    ]


class Reader:
    """Reads what a run has said, from the beginning on. `rank`: only that one's."""

    def __init__(self, run: FoundRun, *, rank: int | None):
        self.run = run
        self.rank = rank
        self._known: dict[Path, Source] = {}
        self._said: dict[str, list[float]] = {}  # in the ranks' logs: when, by text
        self._clocks: dict[
            str, float
        ] = {}  # of each stdout: when its last line that a log has too was written

    def added(self) -> list[Line]:
        """Returns the lines that are new since the last call."""
        for path, label in sources(self.run, rank=self.rank):
            self._known.setdefault(path, Source(path, label))
        lines = [line for source in self._known.values() for line in source.lines()]
        for line in lines:
            if line.label.startswith("rank "):
                self._said.setdefault(
                    LEVEL.sub("", RANK_TIME.sub("", line.text), count=1), []
                ).append(line.time)
        printed = [
            own for line in lines if line.label.endswith("stdout") for own in self._own(line)
        ]
        return [*(line for line in lines if not line.label.endswith("stdout")), *printed]

    def _own(self, line: Line) -> list[Line]:
        """A line of a task's stdout, dated by those around it, or nothing: submitit has said it, or a rank's log has it."""
        clock = max(
            self._clocks.get(line.label, 0.0), line.time if SUBMITITS.match(line.text) else 0.0
        )
        again = next((time for time in self._said.get(line.text, []) if time >= clock), None)
        self._clocks[line.label] = clock if again is None else again
        is_said = again is not None or SUBMITITS.match(line.text)
        return [] if is_said else [line._replace(time=clock or line.time)]


def merged(lines: Sequence[Line]) -> Iterator[str]:
    """Yields lines by their time, one that several ranks say within `ALIKE_S` seconds only once, with all their names."""
    labels: dict[int, list[str]] = {}
    newest: dict[str, tuple[float, int]] = {}  # where a text was said last
    ordered = sorted(lines, key=lambda line: line.time)
    for number, line in enumerate(ordered):
        text = RANK_TIME.sub("", line.text)
        at, first = newest.get(text, (0.0, number))
        is_said = (
            line.label.startswith("rank ")
            and text != line.text
            and line.time - at < ALIKE_S
            and line.label not in labels.get(first, [])
        )
        newest[text] = (at, first) if is_said else (line.time, number)
        labels.setdefault(first if is_said else number, []).append(line.label)
    for number, names in labels.items():
        if len(names) > 1:
            ranks = sorted(int(name.removeprefix("rank ")) for name in names)
            whole = ranks == list(range(ranks[0], ranks[-1] + 1))
            names = [
                f"ranks {ranks[0]}-{ranks[-1]}" if whole else "ranks " + ",".join(map(str, ranks))
            ]
        yield f"[{names[0]}] {ordered[number].text}"


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "ddp-kit logs", description="What a run has said, over all its lives.", allow_abbrev=False
    )
    parser.add_argument("run", help="its folder or a job id")
    parser.add_argument("--rank", type=int, metavar="K", help="only that rank's")
    parser.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help="go on with what is added, until the run is over or Ctrl-C",
    )
    asked = parser.parse_args(argv)
    run = find(asked.run)
    reader = Reader(run, rank=asked.rank)
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        if not _print(reader.added()):
            print(_nothing(run, rank=asked.rank), file=sys.stderr, flush=True)
        if asked.follow:
            _follow(reader)
    return 0


def _print(lines: Sequence[Line]) -> bool:
    """Prints lines by their time. Returns: whether there were any."""
    for line in merged(lines):
        print(line, flush=True)
    return bool(lines)


def _follow(reader: Reader) -> None:
    """Prints what is added until the run is over, its last words too."""
    looks = 0
    looked = time.monotonic()
    while looks < 2:
        time.sleep(POLL_S)
        if time.monotonic() - looked >= ASK_S:
            looks = looks + 1 if reader.run.is_over() else 0
            looked = time.monotonic()
        _print(reader.added())


def _nothing(run: FoundRun, *, rank: int | None) -> str:
    """Returns why there are no lines yet. Raises: LaunchError if the run has ranks, but not that one."""
    logs = sorted(int(path.stem.split("-")[1]) for path in (run.folder / "logs").glob("rank-*.log"))
    if rank is not None and logs and rank not in logs:
        raise LaunchError(f"--rank {rank}: the run has ranks {logs[0]} to {logs[-1]}.")
    waiting = [f" Job {job.id} waits: {job.reason}." for job in run.jobs() if job.is_waiting]
    return f"{run.folder}: nothing has been said yet.{''.join(waiting)}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns: 0, or 2 if there is no such run."""
    return answered("logs", _main, argv)


if __name__ == "__main__":
    sys.exit(main())
