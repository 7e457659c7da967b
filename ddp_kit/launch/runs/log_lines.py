"""The lines of a run's logs in order: the job's own, the ranks', and what their tasks printed.

They are ordered by their time, over all that the run was started again, and each is shown once.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from ddp_kit.launch.runs.found import FoundRun

# between ranks that say the same
ALIKE_S = 2.0
# of a rank's log, local time
RANK_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
# after it
LEVEL = re.compile(r"[A-Z]+ ")
# submitit's own lines in a task's stdout
SUBMITITS = re.compile(r"submitit [A-Z]+ \((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3})\) - ")
# of a batch script
JOB_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} ")


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
    # of the line before; a line without one belongs to it
    time: float = 0.0
    rest: bytes = field(default=b"", repr=False)

    def lines(self) -> Iterator[Line]:
        """Yields what has been added since the last call; an unfinished line is left."""
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
    match = RANK_TIME.match(line)
    if match:
        return datetime.strptime(match[0].strip(), "%Y-%m-%d %H:%M:%S,%f").timestamp()
    match = SUBMITITS.match(line)
    if match:
        return datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
    match = JOB_TIME.match(line)
    if match:
        return datetime.strptime(match[0].strip(), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    return 0.0


def sources(run: FoundRun, *, rank: int | None) -> list[tuple[Path, str]]:
    """Returns the files that a run has now, and whose lines they are.

    They are the jobs' own, what tasks have printed, and the ranks' logs; with `rank` only that
    one's. The logs come last: they are read last, and so hold whatever a task's stdout repeats.
    """
    found: list[tuple[Path, str]] = []
    for submission in run.submissions():
        folder = Path(str(submission["folder"]))
        job = str(submission["job"])
        found.append((folder / f"{job}.log", "job"))
        errors = sorted(folder.glob(f"{job}_*_log.err"))
        outputs = sorted(folder.glob(f"{job}_*_log.out"))
        found += [(path, f"task {_task_of(path)} stderr") for path in errors]
        found += [(path, f"task {_task_of(path)} stdout") for path in outputs]
    found += [(path, f"rank {number}") for number, path in sorted(rank_logs(run).items())]
    found = [(path, label) for path, label in found if path.exists()]
    if rank is None:
        return found
    asked = (f"rank {rank}", f"task {rank} stderr", f"task {rank} stdout")
    return [(path, label) for path, label in found if label in asked]


def rank_logs(run: FoundRun) -> dict[int, Path]:
    """Returns the ranks' logs by rank."""
    paths = (run.folder / "logs").glob("rank-*.log")
    return {int(path.stem.split("-")[1]): path for path in paths}


def _task_of(path: Path) -> str:
    return path.name.split("_")[-2]


class Reader:
    """Reads what a run has said, from the beginning on. `rank`: only that one's."""

    def __init__(self, run: FoundRun, *, rank: int | None):
        self.run = run
        self.rank = rank
        self._known: dict[Path, Source] = {}
        # what stands in the ranks' logs: when it was said, by text
        self._said: dict[str, list[float]] = {}
        # of each stdout: when its last line that a log has too was written
        self._clocks: dict[str, float] = {}

    def added(self) -> list[Line]:
        """Returns the lines that are new since the last call."""
        for path, label in sources(self.run, rank=self.rank):
            self._known.setdefault(path, Source(path, label))
        lines: list[Line] = []
        printed: list[Line] = []
        for source in self._known.values():
            kind = printed if source.label.endswith("stdout") else lines
            kind.extend(source.lines())
        for line in lines:
            if line.label.startswith("rank "):
                text = LEVEL.sub("", RANK_TIME.sub("", line.text), count=1)
                self._said.setdefault(text, []).append(line.time)
        for line in printed:
            dated = self._dated(line)
            if dated is not None:
                lines.append(dated)
        return lines

    def _dated(self, line: Line) -> Line | None:
        """A line of a task's stdout, dated by those around it.

        None if submitit has said it, or a rank's log has it.
        """
        is_submitits = SUBMITITS.match(line.text) is not None
        clock = self._clocks.get(line.label, 0.0)
        if is_submitits:
            clock = max(clock, line.time)
        again = next((time for time in self._said.get(line.text, []) if time >= clock), None)
        if again is not None:
            clock = again
        self._clocks[line.label] = clock
        if is_submitits or again is not None:
            return None
        return line._replace(time=clock or line.time)


def merged(lines: Sequence[Line]) -> Iterator[str]:
    """Yields lines by their time.

    One that several ranks say within `ALIKE_S` seconds comes only once, with all their names.
    """
    ordered = sorted(lines, key=lambda line: line.time)
    labels: dict[int, list[str]] = {}
    # when a text was said last, and the number of the line that stands for it
    newest: dict[str, tuple[float, int]] = {}
    for number, line in enumerate(ordered):
        text = RANK_TIME.sub("", line.text)
        at, first = newest.get(text, (0.0, number))
        is_dated_ranks = line.label.startswith("rank ") and text != line.text
        is_recent = line.time - at < ALIKE_S
        if is_dated_ranks and is_recent and line.label not in labels.get(first, []):
            newest[text] = (at, first)
            labels.setdefault(first, []).append(line.label)
        else:
            newest[text] = (line.time, number)
            labels.setdefault(number, []).append(line.label)
    for number, names in labels.items():
        yield f"[{_together(names)}] {ordered[number].text}"


def _together(names: Sequence[str]) -> str:
    """The names of ranks that say the same, as one."""
    if len(names) == 1:
        return names[0]
    ranks = sorted(int(name.removeprefix("rank ")) for name in names)
    if ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return "ranks " + ",".join(map(str, ranks))
