"""`ddp-kit show RUN`: one screen about a run that lives, has ended, or was torn off.

It reads the run's files and no more: the recipe may not be importable here, and a run that lives
must not notice that it is looked at.
"""

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddp_kit.cli.plot import Point, draw
from ddp_kit.errors import ConfigError, nearest
from ddp_kit.io.json_lines import read_json, read_lines
from ddp_kit.io.tables import printable
from ddp_kit.lifecycle.run_dir import is_in_use
from ddp_kit.settings import Settings, to_json
from ddp_kit.trackers.console import evaluation_line, shown, train_line

if TYPE_CHECKING:
    from rich.text import Text

Record = Mapping[str, object]

FILES = ("status.json", "metrics.jsonl", "settings.json")
HEIGHT = 14
# A larger number is no step of ours, and would not become a float.
MOST = 2**63
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
        """One screen about a run: settings that differ from the defaults, status, metrics, and the
        curve of the loss.

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
    """Returns the lines of the screen.

    Raises: ConfigError if `run` is no run directory; it lists those nearby.
    """
    if not is_run(run):
        raise ConfigError(_no_run(run))
    records = [record for record in read_lines(run / "metrics.jsonl") if _is_whole(record)]
    train = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "eval"]
    newest = {record["kind"]: record for record in records if record["kind"] in ("eval", "test")}
    settings = read_json(run / "settings.json")
    last = "no train record yet"
    if train:
        last = train_line(_numbers(train[-1]))
    lines = [_headline(run), *_settings(settings), *_status(run), _row("last", last)]
    lines += [_row("", evaluation_line(_numbers(record))) for record in newest.values()]
    lines += _best(evaluations, settings)
    lines += _curve(records, width=width)
    return lines


def _is_whole(record: Record) -> bool:
    step = record.get("step")
    is_step = isinstance(step, int) and not isinstance(step, bool) and abs(step) < MOST
    return is_step and isinstance(record.get("kind"), str)


def is_run(path: Path) -> bool:
    """Returns whether the folder holds a run's files."""
    return any((path / name).is_file() for name in FILES)


def _no_run(run: Path) -> str:
    """Returns what is wrong with a path, and what to type."""
    inside = _runs_in(run)
    if inside:
        return f"{run}: holds runs but is none itself. Type one of them: {', '.join(inside[-5:])}"
    nearby = _runs_in(run.parent) or _runs_in(Path("runs"))
    near = nearest(str(run), nearby) or nearest(run.name, nearby)
    message = f"{run}: does not exist."
    if run.exists():
        files = "status.json, metrics.jsonl or settings.json"
        message = f"{run}: is no run directory (it has no {files})."
    if near:
        message += f" Did you mean {near}?"
    if nearby:
        return f"{message} Runs nearby: {', '.join(nearby[-5:])}"
    return f"{message} Type the folder that --run-dir named."


def _runs_in(folder: Path) -> list[str]:
    """Returns the runs in a folder, the newest last."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if is_run(path)]
    return [str(path) for path in sorted(found, key=lambda path: path.stat().st_mtime)]


def _row(name: str, text: str, *, colour: str = "") -> "Text":
    from rich.text import Text

    return Text.assemble((f"{printable(name):9} ", "bold"), (printable(text), colour))


def _headline(run: Path) -> "Text":
    recipe = read_json(run / "settings.json").get("recipe", "")
    return _row("run", f"{run}   {recipe}".rstrip())


def _settings(document: Record) -> list["Text"]:
    """Returns the settings that differ from the recipe's defaults (without them, ddp_kit's own)."""
    settings = _flat(document.get("settings"))
    defaults = _flat(document.get("defaults") or to_json(Settings()))
    if not settings:
        return []
    changed = []
    for name, value in settings.items():
        if value == defaults.get(name):
            continue
        text = f"{name} {shown(value) or 'none'}"
        if name in defaults:
            text += f" (default {shown(defaults[name]) or 'none'})"
        changed.append(text)
    return [_row("settings", ", ".join(changed) or "all defaults")]


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    """Returns {"early_stop.mode": "max"} for {"early_stop": {"mode": "max"}}; {} for no mapping."""
    flat: dict[str, object] = {}
    if not isinstance(value, Mapping):
        return flat
    for name, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = item
    return flat


def _status(run: Path) -> list["Text"]:
    status = read_json(run / "status.json")
    word = str(status.get("status", "unknown: no status.json"))
    if word == "running" and not is_in_use(run):
        killed = "running says status.json, but no live process holds the run: it was killed"
        lines = [_row("status", killed, colour=COLOURS["failed"])]
    else:
        text = word
        if status.get("reason"):
            text += f" ({status['reason']})"
        text += f" at step {status.get('step', '?')}, epoch {status.get('epoch', '?')}"
        lines = [_row("status", text, colour=COLOURS.get(word, ""))]
    if status.get("weights_sha256"):
        lines.append(_row("weights", f"sha256 {status['weights_sha256']}"))
    return [*lines, *_failures(run)]


def _failures(run: Path) -> list["Text"]:
    """Returns the last two failures and signals."""
    events = read_lines(run / "events.jsonl")
    failures = [event for event in events if event.get("event") in ("failure", "signal")]
    rows = []
    for event in failures[-2:]:
        last_line = ""
        message = str(event.get("message", "")).strip().splitlines()
        if message:
            last_line = message[-1]
        where = f"rank {event.get('rank')} at step {event.get('step')}"
        rows.append(_row(str(event["event"]), f"{where}  {last_line}"))
    return rows


def _best(evaluations: Iterable[Record], document: Record) -> list["Text"]:
    """Returns the best value of each metric and its step.

    Which way is better is what early stopping was told, else it is guessed from the name.
    """
    settings = _flat(document.get("settings"))
    values: dict[str, list[tuple[float, object]]] = {}
    for record in evaluations:
        for name, value in _numbers(record).items():
            if isinstance(value, float) and math.isfinite(value):
                values.setdefault(name, []).append((value, record["step"]))
    found = []
    for name, pairs in values.items():
        is_min = smaller_is_better(name)
        if name == settings.get("early_stop.metric"):
            is_min = settings.get("early_stop.mode") == "min"
        choose = min if is_min else max
        value, step = choose(pairs, key=lambda pair: pair[0])
        found.append(f"{name} {shown(value)} (step {step})")
    if not found:
        return []
    return [_row("best", "eval  " + "  ".join(found))]


def smaller_is_better(metric: str) -> bool:
    """Returns what a metric's name suggests."""
    return any(word in metric.lower() for word in SMALLER_IS_BETTER)


def _numbers(record: Record) -> dict[str, object]:
    """Returns the record with "nan", "inf" and "-inf" as numbers again."""
    numbers = dict(record)
    for name, value in record.items():
        if value in ("nan", "inf", "-inf"):
            numbers[name] = float(str(value))
        elif isinstance(value, int) and abs(value) >= MOST:
            numbers[name] = math.inf
    return numbers


def _losses(records: Iterable[Record]) -> dict[str, list[Point]]:
    """Returns the points of every loss.

    They are `train loss` and `eval loss`; with several sets or objectives `eval unseen/loss`.
    """
    series: dict[str, list[Point]] = {}
    for record in records:
        step = float(str(record["step"]))
        for name, value in _numbers(record).items():
            if name.rpartition("/")[2] == "loss" and isinstance(value, int | float):
                points = series.setdefault(f"{record['kind']} {name}", [])
                points.append((step, float(value)))
    return series


def _curve(records: Sequence[Record], *, width: int) -> list["Text"]:
    """Returns the first training loss as a line, with every other loss as marks over it."""
    from rich.text import Text

    series = _losses(records)
    line_name = next((name for name in series if name.startswith("train ")), "")
    line = series.pop(line_name, [])
    legend = []
    if line_name:
        legend.append(f"⠒⠒ {line_name}")
    marks = {}
    for mark, name in zip(MARKS, series, strict=False):
        marks[mark] = series[name]
        legend.append(f"{mark} {name}")
    rows = [Text(row) for row in draw(line, marks, width=width, height=HEIGHT)]
    if not rows:
        return []
    for row in rows:
        row.highlight_regex(r"[\u2800-\u28ff]+", "cyan")
        row.highlight_regex(f"[{MARKS}]", "yellow")
    return [_row("", ""), _row("", "   ".join(legend)), *rows]
