"""What rank 0 says while it trains: one live line on a terminal, plain lines elsewhere.

No thread draws: it would take the interpreter lock from the training step. Control characters go
to a terminal only, and rich is imported only where something is drawn.
"""

import math
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from ddp_kit.distributed.topology import environment
from ddp_kit.io.json_lines import whole
from ddp_kit.io.logs import without_secrets
from ddp_kit.io.tables import printable
from ddp_kit.trackers.base import RunInfo

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

REFRESH_S = 0.25
BAR_WIDTH = 30
# What of a record is no metric, or is said in words.
BOOKKEEPING = {
    "kind",
    "step",
    "epoch",
    "samples",
    "samples_per_s",
    "data_wait",
    "peak_memory_mib",
    "time",
}
# Events that others print: how a run starts, and how it ended.
PRINTED_ELSEWHERE = ("start", "resume", "stop", "failure", "finish", "save", "grace")


class Console:
    """A tracker that prints.

    On a terminal `progress`, called at every step, keeps the line moving between records. Whatever
    else is printed to stdout or stderr while the line is live appears above it.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """Args: `stream` where to print; stdout if not given."""
        self._stream = stream
        self._live: Live | None = None
        self._total = 0
        self._step = 0
        # Step and time of the first finished step, for the time left.
        self._first: tuple[int, float] | None = None
        self._train: Mapping[str, object] = {}
        # Nothing is ever due while nothing is live.
        self._due = math.inf

    def start(self, info: RunInfo) -> None:
        """Chooses between the live line and plain lines; prints nothing yet."""
        self._stream = self._stream or sys.stdout
        self._total = info.total_steps
        if self._stream.isatty() and environment().get("TERM", "dumb") != "dumb":
            self._live = _go_live(self._stream)
            self._due = 0.0

    def progress(self, step: int) -> None:
        """Says that `step` optimizer steps are done.

        Costs a clock reading unless the live line is due.
        """
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
            left_s = self._left_s(step, time.monotonic())
            self._print(train_line(record, total=self._total, left_s=left_s))
        else:
            self._train = record
            self.progress(step)
        self._step = step

    def event(self, event: Mapping[str, object]) -> None:
        """Prints what happens on the way."""
        if event.get("event") in PRINTED_ELSEWHERE:
            return
        line = str(event.get("event"))
        for name in ("step", "rank"):
            if name in event:
                line += f"  {name} {event[name]}"
        if event.get("message"):
            line += f": {event['message']}"
        self._print(line)

    def sample(self, name: str, value: object, *, step: int) -> None:
        """Prints a text; images go to the trackers that can show them."""
        if isinstance(value, str):
            self._print(f"sample  step {step}  {name}: {value}")

    def finish(self, status: Mapping[str, object]) -> None:
        """Draws the live line a last time, gives the terminal back, prints how the run ended."""
        if self._live is not None:
            self._draw(whole(status.get("step")) or self._step, time.monotonic())
            self._live.stop()
        self._live = None
        self._due = math.inf
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
        record = {**self._train, "step": step}
        text = train_line(record, total=self._total, left_s=self._left_s(step, now))
        share = step / self._total if self._total else 0.0
        line = live_line(text, share=share, width=self._live.console.width)
        self._live.update(line, refresh=True)
        self._due = time.monotonic() + REFRESH_S

    def _left_s(self, step: int, now: float) -> float:
        """Returns the seconds to the last step, 0 if they cannot be known yet.

        They are taken at the mean rate since the first step, evaluations included.
        """
        if not self._total or self._first is None:
            return 0.0
        first_step, first_time = self._first
        if step <= first_step:
            return 0.0
        return (now - first_time) / (step - first_step) * max(0, self._total - step)


def train_line(record: Mapping[str, object], *, total: int = 0, left_s: float = 0.0) -> str:
    """Returns a train record as one line of text.

    It tells position, loss, learning rate, other metrics, rate, time left. The loss is the mean
    since the record before.

    Args: `total` optimizer steps of the run, 0 if unknown; `left_s` seconds, 0 if unknown.
    """
    position = f"step {record['step']}"
    if total:
        position += f"/{total}"
    parts = [position]
    if "epoch" in record:
        parts.append(f"epoch {record['epoch']}")
    parts += _metrics(_with_means(record))
    rate = record.get("samples_per_s")
    if isinstance(rate, int | float):
        digits = ",.0f" if rate >= 100 else ".3g"
        parts.append(f"{rate:{digits}} samples/s")
    wait = record.get("data_wait")
    if isinstance(wait, int | float) and wait >= 0.05:
        parts.append(f"{wait:.0%} waiting for data")
    if left_s:
        parts.append(f"{duration(left_s)} left")
    return "  ".join(parts)


def evaluation_line(record: Mapping[str, object]) -> str:
    """Returns an evaluation or test record as one line of text."""
    parts = [f"{record.get('kind')}  step {record['step']}"]
    if "epoch" in record:
        parts.append(f"epoch {record['epoch']}")
    return "  ".join(parts + _metrics(record))


def final_line(status: Mapping[str, object]) -> str:
    """Returns how a run ended as one line of text."""
    ending = str(status.get("status"))
    if status.get("reason"):
        ending += f" ({status['reason']})"
    parts = [f"{ending} at step {status.get('step')}"]
    metrics = status.get("metrics")
    if isinstance(metrics, Mapping):
        parts += _metrics(metrics)
    if status.get("weights_sha256"):
        parts.append(f"weights {str(status['weights_sha256'])[:12]}")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Returns h:mm:ss, or m:ss below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minute:02d}:{second:02d}"
    return f"{minute}:{second:02d}"


def _with_means(record: Mapping[str, object]) -> dict[str, object]:
    """Returns a train record with each `loss_mean` in the place of its `loss`."""
    told = dict(record)
    for name in record:
        own = name.removesuffix("_mean")
        if own != name and own.rpartition("/")[2] == "loss":
            told[own] = told.pop(name)
    return told


def _metrics(record: Mapping[str, object]) -> list[str]:
    """The metrics of a record, loss and learning rate first."""
    names = [name for name in record if name not in BOOKKEEPING]
    names.sort(key=lambda name: (name != "loss", name != "lr"))
    return [f"{name} {shown(record[name])}" for name in names]


def shown(value: object) -> str:
    """Returns a number in four figures, a text as it is."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _go_live(stream: TextIO) -> "Live":
    from rich.console import Console as RichConsole
    from rich.live import Live

    live = Live(console=RichConsole(file=stream, force_terminal=True), auto_refresh=False)
    live.start()
    # A killed run would leave the terminal without one.
    live.console.show_cursor(True)
    return live


def live_line(text: str, *, share: float, width: int) -> "Text":
    """Returns what fits of the text, with a bar before it where there is room.

    Args: `share` what is done, 0 to 1; `width` columns of the terminal. The text is cut between
        its parts.
    """
    from rich.text import Text

    while len(text) >= width and "  " in text:
        text = text.rpartition("  ")[0]
    line = Text(text, no_wrap=True, overflow="crop", end="")
    room = min(BAR_WIDTH, width - len(text) - 3)
    if not share or room < 8:
        return line
    done = min(room, int(share * room))
    bar = ("━" * done, "green")
    rest = ("━" * (room - done), "bright_black")
    return Text.assemble(bar, rest, "  ", line, no_wrap=True, end="")
