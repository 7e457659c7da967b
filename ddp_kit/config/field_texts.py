"""The line of help beside a dataclass field in its source: a text under it, or a comment."""

import ast
import inspect
import io
import textwrap
import tokenize
from functools import cache


@cache
def field_texts(cls: type) -> dict[str, str]:
    """Returns the help of each field that has one, {} for a class whose source is not at hand.

    A text under the field counts first, then a comment on its lines, then comments right above it.
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not hasattr(base, "__dataclass_fields__"):
            continue
        for name, (text, is_comment) in _own_texts(base).items():
            # A comment beside another default tells of that default, not of the field.
            if name not in found or not is_comment:
                found[name] = text
    return found


def _own_texts(cls: type) -> dict[str, tuple[str, bool]]:
    """Returns the text of each field in this class's own source, and whether it is a comment."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
        body = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return {}
    if not isinstance(body, ast.ClassDef):
        return {}
    comments = _comments(source)
    lines = source.splitlines()
    found: dict[str, tuple[str, bool]] = {}
    for statement, after in zip(body.body, [*body.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        name = statement.target.id
        if text := _docstring(after):
            found[name] = (text, False)
        elif text := _beside(statement, comments) or _above(statement, lines):
            found[name] = (text, True)
    return found


def _docstring(statement: ast.stmt | None) -> str:
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
        return ""
    value = statement.value.value
    return " ".join(value.split()) if isinstance(value, str) else ""


def _comments(source: str) -> dict[int, str]:
    """Returns the comments of a source by their line, counted from 1."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = token.string.lstrip("#").strip()
    return found


def _beside(field: ast.stmt, comments: dict[int, str]) -> str:
    last = field.end_lineno or field.lineno
    return " ".join(comments[line] for line in range(field.lineno, last + 1) if line in comments)


def _above(field: ast.stmt, lines: list[str]) -> str:
    found: list[str] = []
    for line in reversed(lines[: field.lineno - 1]):
        text = line.strip()
        if not text.startswith("#"):
            break
        found.insert(0, text.lstrip("#").strip())
    return " ".join(found)
