"""Draws a run's metrics.jsonl as a small SVG picture, with the standard library alone.

    python recipes/pictures/draw.py runs/NAME recipes/pictures/NAME.svg
    python recipes/pictures/draw.py runs/NAME NAME.svg --losses loss --metrics accuracy

The first draws the loss in training and evaluation, the second metrics of the evaluations too, on
the right. Nothing is smoothed: a line shows means over equal parts of the steps, no more.
"""

import argparse
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

Points = list[tuple[float, float]]
WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 68, 508, 30, 206  # the frame's sides, in pixels
COLUMNS = 150  # points that a line is thinned to
# Ratio of largest to smallest value from which an axis is logarithmic, as in `ddp-kit show`.
LOG_FROM = 20.0
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#bc4c00", "#57606a")


def points_of(records: Sequence[dict[str, object]], kind: str, name: str) -> Points:
    """Returns (step, value) of a metric in records of a kind ("train" or "eval"), where it is
    finite.
    """
    found = [
        (record["step"], record[name])
        for record in records
        if record["kind"] == kind and name in record
    ]
    return [
        (float(step), float(value))
        for step, value in found
        if isinstance(value, int | float) and math.isfinite(value)
    ]


def thinned(points: Points) -> Points:
    """Returns at most COLUMNS points: means over equal parts."""
    size = max(1, math.ceil(len(points) / COLUMNS))
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts
    ]


def axis(
    series: dict[str, Points], *, x: int, anchor: str, last: float, colours: Sequence[str]
) -> list[str]:
    """Returns the lines of several metrics on one axis at `x`, evaluations with a dot each, and the
    axis's labels.
    """
    values = []
    for points in series.values():
        values += [y for _, y in points]
    is_log = min(values) > 0 and max(values) / min(values) > LOG_FROM
    scale = math.log10 if is_log else float
    low, high = scale(min(values)), scale(max(values))
    top = BOTTOM - TOP

    def place(step: float, value: float) -> tuple[float, float]:
        return LEFT + (RIGHT - LEFT) * step / last, BOTTOM - top * (
            (scale(value) - low) / (high - low) if high > low else 0.5
        )

    parts = []
    for (name, points), colour in zip(series.items(), colours, strict=False):
        places = [place(*point) for point in points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        if name.startswith("eval"):
            parts += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.2" fill="{colour}"/>' for a, b in places
            ]
    for share in (0, 0.5, 1):
        value = low + share * (high - low)
        label = f"{10**value if is_log else value:.3g}"
        parts.append(
            f'<text x="{x}" y="{BOTTOM - share * top + 4:.0f}" '
            f'text-anchor="{anchor}">{label}</text>'
        )
    return parts


def drawn(run: Path, *, losses: Sequence[str], metrics: Sequence[str]) -> str:
    """Returns the picture as SVG text. Raises: SystemExit if the run has none of the metrics."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    left = {}
    for name in losses:
        for kind in ("train", "eval"):
            left[f"{kind} {name}"] = thinned(points_of(records, kind, name))
    right = {f"eval {name}": thinned(points_of(records, "eval", name)) for name in metrics}
    left, right = (
        {name: points for name, points in side.items() if points} for side in (left, right)
    )
    if not left:
        raise SystemExit(
            f"{run}: no record has {', '.join(losses)}. "
            "Type --losses NAME; metrics.jsonl has the names."
        )
    last = 0.0
    for points in (*left.values(), *right.values()):
        last = max(last, *(step for step, _ in points))
    parts = axis(left, x=LEFT - 6, anchor="end", last=last, colours=COLOURS)
    if right:
        parts += axis(right, x=RIGHT + 6, anchor="start", last=last, colours=COLOURS[len(left) :])
    at = LEFT
    for name, colour in zip([*left, *(f"{name} →" for name in right)], COLOURS, strict=False):
        parts.append(f'<text x="{at}" y="18" fill="{colour}">{escape(name)}</text>')
        at += 6 * len(name) + 14
    parts.append(f'<text x="{LEFT}" y="{BOTTOM + 18}">0</text>')
    parts.append(f'<text x="{RIGHT}" y="{BOTTOM + 18}" text-anchor="end">step {last:g}</text>')
    frame = f'<rect x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" height="{BOTTOM - TOP}" '
    frame += 'fill="none" stroke="#d0d7de"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
    head += 'font-family="sans-serif" font-size="12" fill="#24292f">'
    return "\n".join(
        [
            head,
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            frame,
            *parts,
            "</svg>",
            "",
        ]
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Draws a run's metrics.jsonl as SVG.")
    parser.add_argument("run", type=Path, help="the run's directory")
    parser.add_argument("file", type=Path, help="the picture to write, NAME.svg")
    parser.add_argument(
        "--losses",
        nargs="+",
        default=["loss"],
        help="metrics on the left axis, of training and evaluation",
    )
    parser.add_argument(
        "--metrics", nargs="+", default=[], help="metrics of evaluations on the right axis"
    )
    args = parser.parse_args()
    args.file.write_text(drawn(args.run, losses=args.losses, metrics=args.metrics))


if __name__ == "__main__":
    main()
