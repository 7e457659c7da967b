"""What the pages say of the code is so: flags, variables, rooms, layers, files, functions, messages and links."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages import DOCS, OTHERS, PAGES, module, shown, text
from paths import ROOT

import ddp_kit

LIBRARY = ROOT / "ddp_kit"
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MOST_SPINE = 3900  # lines


def rows(page: str, *, under: str) -> list[list[str]]:
    """Returns the cells of the table below a heading."""
    part = text(page).partition(f"\n## {under}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines[1:]]


def anchors(path: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.M)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings]
    return {kind for name in kept for kind in (re.sub(r"[- ]+", "-", name), name.replace(" ", "-"))}


@pytest.mark.parametrize("path", [*PAGES, *OTHERS], ids=shown)
def test_every_relative_link_resolves(path: Path) -> None:
    wrong = []
    for target in LINK.findall(FENCE.sub("", path.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        if not other.exists() or (anchor and anchor not in anchors(other)):
            wrong.append(target)
    assert not wrong


def test_the_readme_is_a_door() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 160
    assert [line for line in lines if len(line) > 100] == []


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == [str(path.relative_to(DOCS)) for path in PAGES]


def test_the_flags_page_is_made_of_the_fields() -> None:
    assert text("flags.md") == module("make_pages").flags_page(), "type: python docs/make_pages.py"


def test_every_variable_of_ours_is_on_its_page() -> None:
    page = text("environment.md")
    files = [*LIBRARY.rglob("*"), *(ROOT / "launch").rglob("*"), *(ROOT / "slurm").rglob("*")]
    sources = [path for path in files if path.is_file() and "__pycache__" not in path.parts]
    names = set()
    for path in sources:
        names |= set(re.findall(r"DDP_KIT_[A-Z_]*[A-Z]", path.read_text(errors="replace")))
    assert {name for name in names if f"`{name}`" not in page} == set()
    assert set(re.findall(r"DDP_KIT_[A-Z_]*[A-Z]", page)) <= names


def test_the_architecture_names_the_rooms() -> None:
    rooms = {path.name for path in LIBRARY.iterdir() if (path / "__init__.py").is_file()}
    assert {row[0].strip("`/") for row in rows("architecture.md", under="The tree")} == rooms


def held_layers() -> list[list[str]]:
    """Returns what tests/test_structure.py holds the layers to."""
    tree = ast.parse((ROOT / "tests/test_structure.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS":
            return list(ast.literal_eval(node.value))
    raise LookupError("LAYERS")


def test_the_architecture_has_the_layers_that_the_structure_test_holds() -> None:
    layers = {
        int(row[0]): re.findall("`(.+?)`", row[1])
        for row in rows("architecture.md", under="The layers")
    }
    assert {number: sorted(names) for number, names in layers.items()} == {
        number: sorted(names) for number, names in enumerate(held_layers())
    }


def test_the_spine_is_read_in_an_evening_and_its_counts_are_true() -> None:
    page = text("architecture.md")
    spine = {row[0].strip("`"): int(row[1]) for row in rows("architecture.md", under="The spine")}
    actual = {
        name: len((LIBRARY / name).read_text(encoding="utf-8").splitlines()) for name in spine
    }
    assert sum(actual.values()) <= MOST_SPINE
    far = {name: count for name, count in actual.items() if abs(count - spine[name]) > 10}
    assert not far, "type: python docs/make_pages.py"
    said = re.search(r"together they have ([\d,]+) lines", page)
    assert said is not None
    assert int(said[1].replace(",", "")) == sum(spine.values())


def test_each_file_and_function_of_a_walk_is_there() -> None:
    beside = module("beside")
    page = text("architecture.md")
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", page)
    assert len(named) > 20
    for file, name in {*named, *beside.marks(page)}:
        beside.source_of(file, name)  # LookupError names what is not


def test_each_walk_shows_code_for_its_steps() -> None:
    beside = module("beside")
    walks = re.split(r"^## Walk \d", text("architecture.md"), flags=re.MULTILINE)[1:]
    assert len(walks) == 4
    assert all(len(beside.marks(walk)) >= 3 for walk in walks)


def strings(path: Path) -> Iterator[str]:
    """Yields the texts of a module, `…` where a value goes into one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp):
            yield _text(node)


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "…"


def test_each_message_that_has_an_answer_is_one_of_ours() -> None:
    said = {words for path in LIBRARY.rglob("*.py") for words in strings(path)}
    headings = re.findall(r"^### `(.+)`$", text("troubleshooting.md"), re.MULTILINE)
    assert len(headings) > 30
    parts = {heading: heading.split(" … ") for heading in headings}
    missing = [
        heading
        for heading, inner in parts.items()
        if not any(all(part in words for part in inner) for words in said)
    ]
    assert not missing


def test_each_public_name_is_on_the_api_page() -> None:
    page = text("api.md")
    shown_there = set(re.findall(r"^::: ddp_kit\.(\w+)$", page, re.MULTILINE))
    assert set(ddp_kit.__all__) <= shown_there


def test_the_recipe_is_the_same_in_the_readme_and_on_its_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in ("recipe.md", "own-loop.md"):
        block = re.search(r"```python\n.*?```", text(page), re.DOTALL)
        assert block is not None
        assert block[0] in readme
