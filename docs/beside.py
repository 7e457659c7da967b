"""A hook of mkdocs: puts the source of a function beside the line of a walk that names it.

In a page, `<!-- code training/loop.py: fit -->` stands for the source of `fit` as it is when the
pages are built. A name that is not there ends the build. `tests/docs` reads the same marks through
`marks` and `source_of`.
"""

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).resolve().parents[1] / "ddp_kit"
MARK = re.compile(r"^<!-- code (?P<file>[\w/]+\.py): (?P<name>[\w.]+) -->$", re.MULTILINE)
# A step of a walk: a paragraph, and the marks below it.
STEP = re.compile(
    r"(?P<text>(?:^(?!<!--).+\n)+)\n(?P<marks>(?:^<!-- code .* -->\n)+)", re.MULTILINE
)


def marks(markdown: str) -> list[tuple[str, str]]:
    """Returns (file, name) of every mark of a page."""
    return [(found["file"], found["name"]) for found in MARK.finditer(markdown)]


def source_of(file: str, name: str) -> str:
    """Returns the source of a function, class or method of ddp_kit, without its docstring.

    Raises: LookupError if the file or the name is not there.
    """
    path = LIBRARY / file
    if not path.is_file():
        raise LookupError(f"ddp_kit/{file}: there is no such file")
    text = path.read_text(encoding="utf-8")
    node: ast.AST = ast.parse(text)
    for part in name.split("."):
        node = _inner(node, part, where=f"ddp_kit/{file}: {name}")
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    lines = text.splitlines()
    kept = lines[_first_line(node) - 1 : node.end_lineno]
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        start = first.lineno - _first_line(node)
        assert first.end_lineno is not None
        kept[start : start + first.end_lineno - first.lineno + 1] = []
    return textwrap.dedent("\n".join(kept))


def _inner(node: ast.AST, name: str, *, where: str) -> ast.AST:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name == name:
            return child
    raise LookupError(f"{where}: there is no such name")


def _first_line(node: ast.FunctionDef | ast.ClassDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _block(found: re.Match[str]) -> str:
    source = source_of(found["file"], found["name"])
    return f'```python title="{found["file"]}: {found["name"]}"\n{source}\n```\n'


def _step(found: re.Match[str]) -> str:
    code = MARK.sub(_block, found["marks"])
    columns = (f"<div markdown>\n\n{column}\n</div>" for column in (found["text"], code))
    return '<div class="beside" markdown>\n{}\n{}\n</div>\n'.format(*columns)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of each page."""
    if not marks(markdown):
        return markdown
    page.meta["hide"] = ["toc"]  # the code takes its place
    return STEP.sub(_step, markdown)
