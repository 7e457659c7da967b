"""What rank 0 says while it trains: one live line on a terminal, plain lines into a file or a pipe.

Owns: how a record reads. Refuses: a drawing thread (it would take the interpreter lock from the training step), control
characters anywhere but on a terminal, and importing rich where nothing is drawn.
"""

import math
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from ddp_kit.distributed.topology import environment
from ddp_kit.io.logs import without_secrets
from ddp_kit.trackers.base import RunInfo

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

REFRESH_S = 0.25
BAR_WIDTH = 30
BOOKKEEPING = {
    "kind",
    "step",
    "epoch",
    "samples",
    "samples_per_s",
    "data_wait",
    "peak_memory_mib",
    "time",
}  # not metrics, or said in words


class Console:
    """A tracker that prints. On a terminal `progress`, called at every step, keeps the line moving between records.

    Whatever else is printed to stdout or stderr while the line is live appears above it.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """`stream`: where to print; stdout if not given."""
        self._stream = stream
        self._live: Live | None = None
        self._total = 0
        self._step = 0
        self._first: tuple[int, float] | None = (
            None  # step and time of the first finished step, for the time left
        )
        self._train: Mapping[str, object] = {}
        self._due = math.inf  # nothing is ever due while nothing is live

    def start(self, info: RunInfo) -> None:
        """Chooses between the live line and plain lines; prints nothing yet."""
        self._stream = self._stream or sys.stdout
        self._total = info.total_steps
        if self._stream.isatty() and environment().get("TERM", "dumb") != "dumb":
            self._live = _go_live(self._stream)
            self._due = 0.0

    def progress(self, step: int) -> None:
        """Says that `step` optimizer steps are done. Costs a clock reading unless the live line is due."""
        if self._live is None:
            return
        now = time.monotonic()
        if now >= self._due:
            self._draw(step, now)

    def log(self, record: Mapping[str, object]) -> None:
        """Prints the record; a train record on a terminal only changes the live line."""
        step = record.get("step")
        assert isinstance(step, int), record
        self._first = self._first or (step, time.monotonic())
        if record.get("kind") != "train":
            self._print(evaluation_line(record))
        elif self._live is None:
            self._print(
                train_line(record, total=self._total, left_s=self._left_s(step, time.monotonic()))
            )
        else:
            self._train = record
            self.progress(step)
        self._step = step

    def event(self, event: Mapping[str, object]) -> None:
        """Prints what happens on the way. How a run starts is printed by others, how it ended by `finish`."""
        if event.get("event") in ("start", "resume", "stop", "failure", "finish", "save", "grace"):
            return
        where = "".join(f"  {name} {event[name]}" for name in ("step", "rank") if name in event)
        message = f": {event['message']}" if event.get("message") else ""
        self._print(f"{event.get('event')}{where}{message}")

    def sample(self, name: str, value: object, *, step: int) -> None:
        """Prints a text; images go to the trackers that can show them."""
        if isinstance(value, str):
            self._print(f"sample  step {step}  {name}: {value}")

    def finish(self, status: Mapping[str, object]) -> None:
        """Draws the live line a last time, gives the terminal back and prints how the run ended."""
        if self._live is not None:
            self._draw(_whole(status.get("step")) or self._step, time.monotonic())
            self._live.stop()
        self._live, self._due = None, math.inf
        self._print(final_line(status))

    def _print(self, text: str) -> None:
        line = printable(without_secrets(text))
        if self._live is not None:
            self._live.console.print(
                line, markup=False, highlight=False, emoji=False, soft_wrap=True
            )
        else:
            assert self._stream is not None, "start first"
            self._stream.write(line + "\n")
            self._stream.flush()

    def _draw(self, step: int, now: float) -> None:
        assert self._live is not None
        self._first = self._first or (step, now)
        width = self._live.console.width
        text = train_line(
            {**self._train, "step": step}, total=self._total, left_s=self._left_s(step, now)
        )
        self._live.update(
            live_line(text, share=step / self._total if self._total else 0.0, width=width),
            refresh=True,
        )
        self._due = time.monotonic() + REFRESH_S

    def _left_s(self, step: int, now: float) -> float:
        """Seconds to the last step at the mean rate since the first one, evaluations included; 0 if it cannot be known yet."""
        if not self._total or self._first is None or step <= self._first[0]:
            return 0.0
        return (now - self._first[1]) / (step - self._first[0]) * max(0, self._total - step)


def train_line(record: Mapping[str, object], *, total: int = 0, left_s: float = 0.0) -> str:
    """Returns a train record as one line of text: position, loss, learning rate, other metrics, rate, time left."""
    parts = [f"step {record['step']}/{total}" if total else f"step {record['step']}"]
    if "epoch" in record:
        parts.append(f"epoch {record['epoch']}")
    parts += _metrics(record)
    rate, wait = record.get("samples_per_s"), record.get("data_wait")
    if isinstance(rate, int | float):
        parts.append(f"{rate:,.0f} samples/s" if rate >= 100 else f"{rate:.3g} samples/s")
    if isinstance(wait, int | float) and wait >= 0.05:
        parts.append(f"{wait:.0%} waiting for data")
    if left_s:
        parts.append(f"{duration(left_s)} left")
    return "  ".join(parts)


def evaluation_line(record: Mapping[str, object]) -> str:
    """Returns an evaluation or test record as one line of text."""
    epoch = [f"epoch {record['epoch']}"] if "epoch" in record else []
    return "  ".join([f"{record.get('kind')}  step {record['step']}", *epoch, *_metrics(record)])


def final_line(status: Mapping[str, object]) -> str:
    """Returns how a run ended as one line of text."""
    reason = f" ({status['reason']})" if status.get("reason") else ""
    metrics = status.get("metrics")
    found = _metrics(metrics) if isinstance(metrics, Mapping) else []
    weights = (
        [f"weights {str(status['weights_sha256'])[:12]}"] if status.get("weights_sha256") else []
    )
    return "  ".join(
        [f"{status.get('status')}{reason} at step {status.get('step')}", *found, *weights]
    )


def duration(seconds: float) -> str:
    """Returns h:mm:ss, or m:ss below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def printable(text: str) -> str:
    """Returns the text without control characters; a newline inside becomes a space, as a record is one line."""
    return "".join(character if character.isprintable() else " " for character in text)


def _metrics(record: Mapping[str, object]) -> list[str]:
    """The metrics of a record, loss and learning rate first."""
    names = [name for name in record if name not in BOOKKEEPING]
    names.sort(key=lambda name: (name != "loss", name != "lr"))
    return [f"{name} {shown(record[name])}" for name in names]


def shown(value: object) -> str:
    """Returns a number in four figures, a text as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def _go_live(stream: TextIO) -> "Live":
    from rich.console import Console as RichConsole
    from rich.live import Live

    live = Live(console=RichConsole(file=stream, force_terminal=True), auto_refresh=False)
    live.start()
    live.console.show_cursor(True)  # a killed run would leave the terminal without one
    return live


def live_line(text: str, *, share: float, width: int) -> "Text":
    """Returns what fits of the text, cut between words, with a bar for the `share` that is done where there is room."""
    from rich.text import Text

    while len(text) >= width and "  " in text:
        text = text.rpartition("  ")[0]
    line = Text(text, no_wrap=True, overflow="crop", end="")
    room = min(BAR_WIDTH, width - len(text) - 3)
    if share and room >= 8:
        done = min(room, int(share * room))
        line = Text.assemble(
            ("━" * done, "green"),
            ("━" * (room - done), "bright_black"),
            "  ",
            line,
            no_wrap=True,
            end="",
        )
    return line
