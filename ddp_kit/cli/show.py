"""`ddp-kit show RUN`: one screen about a run that lives, has ended, or was torn off.

Owns: what is worth a line. Refuses: importing the recipe, and changing anything; it reads the run's files and no more.
"""

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddp_kit.cli.plot import Point, draw
from ddp_kit.errors import ConfigError, nearest
from ddp_kit.io.json_lines import read_json, read_lines
from ddp_kit.lifecycle.run_dir import is_in_use
from ddp_kit.settings import Settings, to_json
from ddp_kit.trackers.console import evaluation_line, shown, train_line

if TYPE_CHECKING:
    from rich.text import Text

Record = Mapping[str, object]

FILES = ("status.json", "metrics.jsonl", "settings.json")
HEIGHT = 14
MARKS = "●▲■◆"
SMALLER_IS_BETTER = ("loss", "error", "perplexity", "mae", "mse", "rmse", "nll")
COLOURS = {
    "finished": "green",
    "running": "cyan",
    "stopped": "yellow",
    "preempted": "yellow",
    "failed": "red",
}


def main(argv: Sequence[str]) -> int:
    """Prints the screen. Returns: 0. Raises: ConfigError if RUN is no run directory."""
    import tyro

    def show(run: tyro.conf.Positional[Path]) -> None:
        """One screen about a run: settings that differ from the defaults, status, metrics, and the curve of the loss.

        Args:
            run: the run's directory, for instance runs/NAME
        """
        from rich.console import Console

        width = max(shutil.get_terminal_size().columns, 40)
        console = Console(highlight=False, width=width)
        for line in screen(run, width=min(width, 120)):
            console.print(line, soft_wrap=True)

    tyro.cli(show, args=argv, prog="ddp-kit show")
    return 0


def screen(run: Path, *, width: int) -> list["Text"]:
    """Returns the lines of the screen. Raises: ConfigError if `run` is no run directory; it lists those nearby."""
    if not is_run(run):
        raise ConfigError(_no_run(run))
    records = [
        record
        for record in read_lines(run / "metrics.jsonl")
        if isinstance(record.get("step"), int) and "kind" in record
    ]
    train = [record for record in records if record.get("kind") == "train"]
    newest = {
        record["kind"]: record for record in records if record.get("kind") in ("eval", "test")
    }
    settings = read_json(run / "settings.json")
    lines = [_headline(run), *_settings(settings), *_status(run)]
    lines += (
        [_row("last", train_line(_numbers(train[-1])))]
        if train
        else [_row("last", "no train record yet")]
    )
    lines += [_row("", evaluation_line(_numbers(record))) for record in newest.values()]
    lines += _best([record for record in records if record.get("kind") == "eval"], settings)
    return [*lines, *_curve(records, width=width)]


def is_run(path: Path) -> bool:
    """Returns whether the folder holds a run's files."""
    return any((path / name).is_file() for name in FILES)


def _no_run(run: Path) -> str:
    if run.is_dir() and (inside := _runs_in(run)):
        return f"{run}: holds runs but is none itself. Type one of them: {', '.join(inside[-5:])}"
    nearby = _runs_in(run.parent) or _runs_in(Path("runs"))
    near = nearest(str(run), nearby) or nearest(run.name, nearby)
    what = (
        "is no run directory (it has no status.json, metrics.jsonl or settings.json)"
        if run.exists()
        else "does not exist"
    )
    hint = f" Did you mean {near}?" if near else ""
    return f"{run}: {what}.{hint}" + (
        f" Runs nearby: {', '.join(nearby[-5:])}"
        if nearby
        else " Type the folder that --run-dir named."
    )


def _runs_in(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if is_run(path)]
    return [str(path) for path in sorted(found, key=lambda path: path.stat().st_mtime)]


def _row(name: str, text: str, *, colour: str = "") -> "Text":
    from rich.text import Text

    return Text.assemble((f"{name:9} ", "bold"), (text, colour))


def _headline(run: Path) -> "Text":
    recipe = read_json(run / "settings.json").get("recipe", "")
    return _row("run", f"{run}   {recipe}".rstrip())


def _settings(document: Record) -> list["Text"]:
    """Those that differ from the recipe's defaults where the file has them, else from ddp_kit's own."""
    settings, defaults = (
        _flat(document.get("settings")),
        _flat(document.get("defaults") or to_json(Settings())),
    )
    changed = [
        f"{name} {shown(value) or 'none'}"
        + (f" (default {shown(defaults[name]) or 'none'})" if name in defaults else "")
        for name, value in settings.items()
        if value != defaults.get(name)
    ]
    return [_row("settings", ", ".join(changed) or "all defaults")] if settings else []


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, item in value.items() if isinstance(value, Mapping) else ():
        flat |= (
            _flat(item, f"{prefix}{name}.")
            if isinstance(item, Mapping)
            else {f"{prefix}{name}": item}
        )
    return flat


def _status(run: Path) -> list["Text"]:
    status = read_json(run / "status.json")
    word = str(status.get("status", "unknown: no status.json"))
    text = word + (f" ({status['reason']})" if status.get("reason") else "")
    if word == "running" and not is_in_use(run):
        text, word = (
            "running says status.json, but no live process holds the run: it was killed",
            "failed",
        )
    else:
        text += f" at step {status.get('step', '?')}, epoch {status.get('epoch', '?')}"
    lines = [_row("status", text, colour=COLOURS.get(word, ""))]
    if status.get("weights_sha256"):
        lines.append(_row("weights", f"sha256 {status['weights_sha256']}"))
    failures = [
        event
        for event in read_lines(run / "events.jsonl")
        if event.get("event") in ("failure", "signal")
    ]
    for event in failures[-2:]:
        message = str(event.get("message", "")).strip().splitlines()
        lines.append(
            _row(
                str(event["event"]),
                f"rank {event.get('rank')} at step {event.get('step')}  {message[-1] if message else ''}",
            )
        )
    return lines


def _best(evaluations: Iterable[Record], document: Record) -> list["Text"]:
    """The best value of each metric and its step. Its direction is that of early stopping, else guessed from the name."""
    early = _flat(document.get("settings"))
    values: dict[str, list[tuple[float, object]]] = {}
    for record in evaluations:
        for name, value in _numbers(record).items():
            if isinstance(value, float) and math.isfinite(value):
                values.setdefault(name, []).append((value, record["step"]))
    found = []
    for name, pairs in values.items():
        is_min = smaller_is_better(name)
        if name == early.get("early_stop.metric"):
            is_min = early.get("early_stop.mode") == "min"
        value, step = (min if is_min else max)(pairs, key=lambda pair: pair[0])
        found.append(f"{name} {shown(value)} (step {step})")
    return [_row("best", "eval  " + "  ".join(found))] if found else []


def smaller_is_better(metric: str) -> bool:
    """Returns what a metric's name suggests."""
    return any(word in metric.lower() for word in SMALLER_IS_BETTER)


def _numbers(record: Record) -> dict[str, object]:
    """The record with "nan", "inf" and "-inf" as numbers again."""
    return {
        name: float(str(value)) if value in ("nan", "inf", "-inf") else value
        for name, value in record.items()
    }


def _losses(records: Iterable[Record]) -> dict[str, list[Point]]:
    """The points of every loss: `train loss`, `eval loss`, with several sets or objectives `eval unseen/loss`."""
    series: dict[str, list[Point]] = {}
    for record in records:
        for name, value in _numbers(record).items():
            if name.rpartition("/")[2] == "loss" and isinstance(value, int | float):
                series.setdefault(f"{record['kind']} {name}", []).append(
                    (float(str(record["step"])), float(value))
                )
    return series


def _curve(records: Sequence[Record], *, width: int) -> list["Text"]:
    """The first training loss as a line, every other loss as marks over it."""
    from rich.text import Text

    series = _losses(records)
    main_name = next((name for name in series if name.startswith("train ")), "")
    line = series.pop(main_name, [])
    names = dict(zip(MARKS, series, strict=False))
    rows = [
        Text(row)
        for row in draw(
            line, {mark: series[name] for mark, name in names.items()}, width=width, height=HEIGHT
        )
    ]
    for row in rows:
        row.highlight_regex(r"[\u2800-\u28ff]+", "cyan")
        row.highlight_regex(f"[{MARKS}]", "yellow")
    legend = [
        *([f"⠒⠒ {main_name}"] if main_name else []),
        *(f"{mark} {name}" for mark, name in names.items()),
    ]
    return [_row("", ""), _row("", "   ".join(legend)), *rows] if rows else []
