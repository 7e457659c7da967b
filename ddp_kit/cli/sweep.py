"""`ddp-kit sweep --show NAME`: a sweep's runs side by side, and their curves in one frame.

Owns: which value of a run counts and the order of rows. Refuses: changing anything; it reads the runs' files and no more.
"""

import math
import shutil
import string
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ddp_kit.cli.plot import Point, draw
from ddp_kit.cli.show import smaller_is_better
from ddp_kit.errors import ConfigError, DdpKitError
from ddp_kit.io.json_lines import read_json, read_lines
from ddp_kit.trackers.console import shown

HEIGHT = 14


def main(argv: Sequence[str]) -> int:
    """Prints table and plot. Returns: 0. Raises: ConfigError if the folder holds no sweep."""
    import tyro

    def results(sweep: tyro.conf.Positional[Path], metric: str = "") -> None:
        """A sweep's runs side by side, the best first, and their curves in one frame.

        Args:
            sweep: the sweep's folder, for instance runs/NAME
            metric: evaluation metric to sort by and to plot; empty: the first one that the runs have
        """
        print_results(sweep, metric=metric)

    tyro.cli(results, args=argv, prog="ddp-kit sweep --show")
    return 0


def print_results(sweep: Path, *, metric: str) -> None:
    """Prints the table and the plot of a sweep. Raises: ConfigError if it is none, or has no such metric."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    points = _points(sweep)
    curves = {name: _curves(sweep / name) for name in points}
    metrics = list(dict.fromkeys(name for run in curves.values() for name in run))
    if metric and metric not in metrics:
        raise ConfigError(f"--metric {metric}: the runs have {', '.join(metrics) or 'none yet'}.")
    by = metric or next(iter(metrics), "")
    others = [name for name in metrics if name != by]
    is_min = smaller_is_better(by)
    best = {name: _best(run.get(by, []), is_min=is_min) for name, run in curves.items()}
    order = sorted(
        points,
        key=lambda name: (math.isnan(best[name][1]), best[name][1] if is_min else -best[name][1]),
    )
    letters = dict(zip(order, string.ascii_letters, strict=False))
    axes = list(dict.fromkeys(axis for point in points.values() for axis in point))
    table = Table("", *axes, "status", "step", f"best {by}", "at step", *others, box=box.SIMPLE)
    for name in order:
        status, (at, value) = read_json(sweep / name / "status.json"), best[name]
        row = [letters.get(name, ""), *(str(points[name].get(axis, "")) for axis in axes)]
        row += [str(status.get("status", "waiting")), str(status.get("step", "-"))]
        row += ["-", "-"] if math.isnan(value) else [shown(value), f"{at:g}"]
        table.add_row(
            *row,
            *(
                shown(curves[name][other][-1][1]) if other in curves[name] else "-"
                for other in others
            ),
        )
    width = max(shutil.get_terminal_size().columns, 60)
    console = Console(highlight=False, width=width)
    console.print(table)
    frame = draw(
        [],
        {letters[name]: curves[name].get(by, []) for name in letters},
        width=min(width, 120),
        height=HEIGHT,
    )
    for line in [f"   {by}, one letter a run", *frame] if frame else ["   no evaluation yet"]:
        console.print(line, markup=False)


def _points(sweep: Path) -> dict[str, Mapping[str, str]]:
    """The sweep's points by the name of their folder."""
    path = sweep / "sweep.json"
    if not path.is_file():
        raise ConfigError(
            f"{sweep}: no sweep (it has no sweep.json). Type the folder that `ddp-kit sweep` named."
        )
    runs: dict[str, Mapping[str, str]] = read_json(path)["runs"]  # type: ignore[assignment]  # as launch/sweep.py writes it
    return runs


def _curves(run: Path) -> dict[str, list[Point]]:
    """The evaluation metrics of a run by step."""
    found: dict[str, list[Point]] = {}
    for record in read_lines(run / "metrics.jsonl"):
        if record.get("kind") == "eval":
            for name, value in record.items():
                if isinstance(value, float) and math.isfinite(value):
                    found.setdefault(name, []).append((float(str(record["step"])), value))
    return {name: points for name, points in found.items() if name != "time"}


def _best(points: Sequence[Point], *, is_min: bool) -> Point:
    """The step and value of the best evaluation; not a number without one."""
    return (
        (min if is_min else max)(points, key=lambda point: point[1])
        if points
        else (math.nan, math.nan)
    )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except DdpKitError as error:
        sys.exit(f"ddp-kit sweep: {error}")
