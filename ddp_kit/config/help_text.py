"""What `RECIPE.py --help` prints: the recipe's own flags first, then ddp_kit's by task."""

import inspect
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from ddp_kit.config.flags import Flag, flags_of
from ddp_kit.settings import Settings

INDENT = " " * 2
TEXT_INDENT = " " * 26
WIDEST = 100  # columns: longer lines are hard to read
GENERAL = [
    Flag("--settings", "", "FILE", "", "TOML or JSON file of settings; flags win over it"),
    Flag("-h, --help", "", "", "", "show this help message and exit"),
]


def help_text(cls: type[Settings], default: Settings, *, prog: str) -> str:
    """Returns usage, what the recipe is, and each flag with its type, default and help."""
    own: list[Flag] = []
    by_task: dict[str, list[Flag]] = {}
    for each in flags_of(cls, default):
        if each.task:
            by_task.setdefault(each.task, []).append(each)
        else:
            own.append(each)
    width = min(shutil.get_terminal_size().columns, WIDEST)
    parts = [f"usage: {prog} [OPTIONS]", ""]
    if cls.__doc__:
        parts += [inspect.cleandoc(cls.__doc__), ""]
    if own:
        parts += _section(_file_of(cls), own, width=width)
    for task, flags in by_task.items():
        parts += _section(task, flags, width=width)
    parts += _section("general", GENERAL, width=width)
    return "\n".join(parts)


def _file_of(cls: type) -> str:
    try:
        return Path(inspect.getfile(cls)).name
    except (OSError, TypeError):  # made in a notebook
        return "recipe"


def _section(title: str, flags: Sequence[Flag], *, width: int) -> list[str]:
    lines = [f"{title}:"]
    group = ""
    for each in flags:
        if each.group and each.group != group:
            lines.append(INDENT + each.group)
        group = each.group
        lines += _entry(each, width=width)
    return [*lines, ""]


def _entry(each: Flag, *, width: int) -> list[str]:
    """Returns a flag with its help beside it, or below where its name leaves no room for that."""
    head = INDENT + f"{each.name} {each.kind}".strip()
    if each.negative:
        head += f", {each.negative}"
    text = each.text
    if each.default or each.kind not in ("", "FILE"):
        text = f"{text} (default: {each.default})".strip()
    filled = textwrap.wrap(
        text,
        width=max(width, len(TEXT_INDENT) + 20),
        initial_indent=TEXT_INDENT,
        subsequent_indent=TEXT_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
    if len(head) > len(TEXT_INDENT) - 2 or not filled:
        return [head, *filled]
    first = head.ljust(len(TEXT_INDENT)) + filled[0].lstrip()
    return [first, *filled[1:]]
