"""`ddp-kit sweep --show NAME`: a sweep's runs side by side, and their curves in one frame.

It reads the runs' files and no more, so it may be asked while they run.
"""

import math
import shutil
import string
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ddp_kit.cli.plot import Point, draw
from ddp_kit.cli.show import MOST, smaller_is_better
from ddp_kit.errors import ConfigError, DdpKitError
from ddp_kit.io.json_lines import read_json, read_lines, whole
from ddp_kit.io.tables import printable
from ddp_kit.trackers.console import shown

if TYPE_CHECKING:
    from rich.table import Table

HEIGHT = 14


def main(argv: Sequence[str]) -> int:
    """Prints table and plot.

    Returns: 0.
    Raises: ConfigError if the folder holds no sweep, or its runs have no such metric.
    """
    import tyro

    metric_help = (
        "evaluation metric to sort by and to plot; empty: the first one that the runs have"
    )

    def results(
        sweep: tyro.conf.Positional[Path],
        metric: Annotated[str, tyro.conf.arg(help=metric_help)] = "",
    ) -> None:
        """A sweep's runs side by side, the best first, and their curves in one frame.

        Args:
            sweep: the sweep's folder, for instance runs/NAME
        """
        print_results(sweep, metric=metric)

    tyro.cli(results, args=argv, prog="ddp-kit sweep --show")
    return 0


@dataclass(frozen=True)
class _Run:
    """One point of the sweep, and what its metrics say."""

    name: str
    point: Mapping[str, str]
    curves: Mapping[str, Sequence[Point]]
    best: Point  # of the metric that counts; not a number without an evaluation


def print_results(sweep: Path, *, metric: str) -> None:
    """Prints the table and the plot of a sweep.

    Raises: ConfigError if it is none, or has no such metric.
    """
    from rich.console import Console

    points = _points(sweep)
    curves = {name: _curves(sweep / name) for name in points}
    metrics = _names_in(curves.values())
    if metric and metric not in metrics:
        raise ConfigError(f"--metric {metric}: the runs have {', '.join(metrics) or 'none yet'}.")
    by = metric or next(iter(metrics), "")
    is_min = smaller_is_better(by)
    runs = []
    for name, point in points.items():
        best = _best(curves[name].get(by, []), is_min=is_min)
        runs.append(_Run(name, point, curves[name], best))

    def place(run: _Run) -> tuple[bool, float]:
        value = run.best[1]
        # A run without an evaluation comes last.
        return math.isnan(value), value if is_min else -value

    runs.sort(key=place)
    width = max(shutil.get_terminal_size().columns, 60)
    console = Console(highlight=False, width=width)
    others = [name for name in metrics if name != by]
    console.print(_table(sweep, runs, axes=_names_in(points.values()), by=by, others=others))
    marks = {}
    for letter, run in zip(string.ascii_letters, runs, strict=False):
        marks[letter] = run.curves.get(by, [])
    lines = draw([], marks, width=min(width, 120), height=HEIGHT)
    if lines:
        lines.insert(0, f"   {printable(by)}, one letter a run")
    else:
        lines.append("   no evaluation yet")
    for line in lines:
        console.print(line, markup=False)


def _names_in(mappings: Iterable[Mapping[str, object]]) -> list[str]:
    """Returns all keys, in the order in which they come first."""
    names: dict[str, None] = {}
    for mapping in mappings:
        names |= dict.fromkeys(mapping)
    return list(names)


def _table(
    sweep: Path, runs: Sequence[_Run], *, axes: Sequence[str], by: str, others: Sequence[str]
) -> "Table":
    """Returns a row for each run: point, status, best value of `by`, last values of `others`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    names = ["", *axes, "status", "step", f"best {by}", "at step", *others]
    table = Table(box=box.SIMPLE)
    for name in names:
        table.add_column(Text(printable(name)))
    for at, run in enumerate(runs):
        status = read_json(sweep / run.name / "status.json")
        row = [string.ascii_letters[at : at + 1]]
        row += [str(run.point.get(axis, "")) for axis in axes]
        row += [str(status.get("status", "waiting")), str(status.get("step", "-"))]
        step, value = run.best
        if math.isnan(value):
            row += ["-", "-"]
        else:
            row += [shown(value), f"{step:g}"]
        for name in others:
            if name in run.curves:
                row.append(shown(run.curves[name][-1][1]))
            else:
                row.append("-")
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def _points(sweep: Path) -> dict[str, Mapping[str, str]]:
    """Returns the sweep's points by the name of their folder. Raises: ConfigError if it is none."""
    path = sweep / "sweep.json"
    if not path.is_file():
        raise ConfigError(
            f"{sweep}: no sweep (it has no sweep.json). Type the folder that `ddp-kit sweep` named."
        )
    # As ddp_kit.launch.runs.sweep writes it.
    runs: dict[str, Mapping[str, str]] = read_json(path).get("runs", {})  # type: ignore[assignment]
    return runs


def _curves(run: Path) -> dict[str, list[Point]]:
    """Returns the evaluation metrics of a run by step."""
    found: dict[str, list[Point]] = {}
    for record in read_lines(run / "metrics.jsonl"):
        step = whole(record.get("step"))
        if record.get("kind") != "eval" or not 0 < step < MOST:
            continue
        for name, value in record.items():
            if name != "time" and isinstance(value, float) and math.isfinite(value):
                found.setdefault(name, []).append((float(step), value))
    return found


def _best(points: Sequence[Point], *, is_min: bool) -> Point:
    """Returns the step and value of the best evaluation; not a number without one."""
    if not points:
        return (math.nan, math.nan)
    choose = min if is_min else max
    return choose(points, key=lambda point: point[1])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except DdpKitError as error:
        sys.exit(f"ddp-kit sweep: {error}")
