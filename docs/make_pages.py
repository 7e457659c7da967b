"""Writes what pages take from the code: `python docs/make_pages.py`.

`flags.md` is written whole; in `architecture.md` the line counts of the spine are brought up to
date. A test compares.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from pathlib import Path
from typing import Literal

from ddp_kit.checkpoint.resume import FREE
from ddp_kit.config.command_line import PEERS
from ddp_kit.settings import Settings, flag

DOCS = Path(__file__).resolve().parent
SPINE = re.compile(r"^\| `(?P<file>[\w/]+\.py)` \| (?P<lines>\d+) \|", re.MULTILINE)
SUM = re.compile(r"(?P<before>together they have )[\d,]+(?P<after> lines)")
HEAD = """\
# Flags

<!-- Written by docs/make_pages.py from the fields of ddp_kit.settings; edit those. -->

Every field of a recipe's `Settings` is a flag. Those below belong to every recipe;
`RECIPE.py --help` lists a recipe's own beside them, with the defaults that it sets.

```sh
python -m ddp_kit.train recipes/digits.py --help
```

A flag that does not exist, a value of the wrong type and flags that do not go together are refused
before any process group starts, all at once, once for all ranks, with the nearest valid name.

* `--settings FILE` (TOML or JSON, for instance a run's own `settings.json`) sets fields. Flags win.
  A secret that was redacted in that file has to be typed again.
* A field that is on or off has two flags: `--exact` and `--no-exact`.
* `--epochs` and `--max-steps`: schedules count the steps of the epochs if those are set, beside
  which `--max-steps` only stops earlier.
* `--tracker` names what is used beside the console and the JSON lines, which are always on. W&B is
  offline where no key is found.
* `--run-dir` is by default `runs/<recipe>-<UTC time>`, in a SLURM job `runs/<recipe>-<job id>`,
  with `_<task>` behind it in an array.

"Free" means that a run may be resumed with another value. Anything else is refused on resume,
unless it is named (`--change lr`):
see [Checkpoints](checkpoints.md#what-may-change-when-a-run-goes-on).
"""
NOTES = {
    "max_steps": "free beside epochs",
    "threads": "free, but not with `--exact`",
}


def documented(cls: type) -> dict[str, str]:
    """Returns the text below each field of a class."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and is_text:
            assert isinstance(field.target, ast.Name)
            texts[field.target.id] = str(text.value.value)
    return texts


def choices(hint: object) -> str:
    """Returns what a field takes, where that is one of some words."""
    inner = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "One of " + ", ".join(f"`{value}`" for value in inner if value != "") + "."
    if typing.get_origin(hint) is tuple:
        return f"{choices(inner[0]).replace('One', 'Any')} May be several."
    return ""


def shown(value: object) -> str:
    """Returns a default in words."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value in ("", ()):
        return "none"
    return f"`{value}`"


def rows(cls: type, *, prefix: str = "", is_free: bool = False) -> list[str]:
    """Returns a table's row for each field that is no group of fields."""
    hints, texts = typing.get_type_hints(cls), documented(cls)
    lines = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            continue
        name = prefix + flag(field.name).removeprefix("--" if prefix else "")
        changes = NOTES.get(field.name, "")
        if not changes:
            changes = "free" if is_free or field.name in FREE else ""
        # a text of several lines would end the table's row
        text = " ".join(texts[field.name].split())
        meaning = f"{text}. {choices(hint)}".replace("..", ".").strip()
        cells = [f"`{name}`", meaning, shown(field.default), changes]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def flags_page() -> str:
    """Returns flags.md."""
    head = ["| flag | meaning | default | on resume |", "|---|---|---|---|"]
    parts = [HEAD, '<div class="flags" markdown>']
    parts += ["## Every recipe", "\n".join([*head, *rows(Settings)])]
    for name, hint in typing.get_type_hints(Settings).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            parts += [f"## {flag(name)}.*", str(hint.__doc__)]
            inner = rows(hint, prefix=f"{flag(name)}.", is_free=name in FREE)
            parts.append("\n".join([*head, *inner]))
    peers = [f"| `{name}` | {text} |" for name, text in PEERS.items()]
    parts += [
        "## Other toolkits' names",
        "Typing one of these is answered with ours, unless the recipe has a field of that name.",
        "\n".join(["| typed | answer |", "|---|---|", *peers]),
        "</div>",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def with_counts(page: str) -> str:
    """Returns architecture.md with the spine's line counts as they are."""
    total = 0

    def counted(found: re.Match[str]) -> str:
        nonlocal total
        path = DOCS.parent / "ddp_kit" / found["file"]
        count = len(path.read_text(encoding="utf-8").splitlines())
        total += count
        return f"| `{found['file']}` | {count} |"

    page = SPINE.sub(counted, page)
    return SUM.sub(rf"\g<before>{total:,}\g<after>", page)


if __name__ == "__main__":
    (DOCS / "flags.md").write_text(flags_page(), encoding="utf-8")
    architecture = DOCS / "architecture.md"
    architecture.write_text(with_counts(architecture.read_text(encoding="utf-8")), encoding="utf-8")
