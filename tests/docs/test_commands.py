"""Every command block of README and quickstart runs as it is typed, but for `uv run`: this Python is the one that uv made.

A comment above a block says how: `<!-- run -->`, `<!-- run first -->` (the page's later blocks need what it leaves),
`<!-- run: needs data, slow -->` (one of the others shows nearly as much), or `<!-- not run: why -->`.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import small_cifar
from pages import DOCS, text
from paths import RECIPES, ROOT
from small_mnist import write_small_mnist

from ddp_kit.recipe import load_recipe

BLOCK = re.compile(r"^<!-- (?P<how>.+?) -->\n```sh\n(?P<commands>.*?)^```$", re.M | re.S)
DEADLINE_S = 300
HELD_OUT = 5000  # images, whatever a data set has


@dataclass(frozen=True)
class Block:
    """A block of commands of a page."""

    page: Path
    how: str
    commands: str

    @property
    def is_first(self) -> bool:
        return self.how == "run first"


def blocks(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(page, block["how"], block["commands"]) for block in found]


COMMAND_PAGES = [ROOT / "README.md", DOCS / "quickstart.md"]


def cases() -> Iterator[object]:
    for page in COMMAND_PAGES:
        for number, block in enumerate(blocks(page)):
            if block.how.startswith("run"):
                marks = [pytest.mark.slow, pytest.mark.steady] if "slow" in block.how else []
                yield pytest.param(block, marks=marks, id=f"{page.stem}-{number}")


def run(commands: str, *, folder: Path) -> None:
    """Runs commands as a person types them in a checkout, where everything is installed already."""
    typed = commands.replace("pip install uv && ", "").replace("uv run ", "")
    found = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", typed],
        cwd=folder,
        env={**os.environ, "PATH": found},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, f"{typed}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Returns what makes, once for each page, a folder with the recipes in which its first block has run."""
    made: dict[Path, Path] = {}

    def of(page: Path) -> Path:
        if page not in made:
            folder = made[page] = tmp_path_factory.mktemp(page.stem)
            ignored = shutil.ignore_patterns("pictures", "__pycache__")
            shutil.copytree(RECIPES, folder / "recipes", ignore=ignored)
            for block in blocks(page):
                if block.is_first:
                    run(block.commands, folder=folder)
        return made[page]

    return of


@pytest.mark.parametrize("block", list(cases()))
def test_a_block_of_commands_runs(block: Block, checkout: Callable[[Path], Path]) -> None:
    folder = checkout(block.page)
    if "needs data" in block.how:
        small_cifar.make(folder / "data", train=HELD_OUT // 10 + 60)
        write_small_mnist(folder / "data")
    if not block.is_first:
        run(block.commands, folder=folder)


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=lambda page: page.stem)
def test_each_block_says_whether_it_is_run(page: Path) -> None:
    found = blocks(page)
    assert page.read_text(encoding="utf-8").count("```sh") == len(found)
    hows = [block.how for block in found]
    assert all(how.startswith("run") or re.match("not run: .{10}", how) for how in hows)


def test_the_two_commands_are_these() -> None:
    commands = [block.commands.strip() for block in blocks(ROOT / "README.md")]
    assert commands[:2] == [
        "pip install uv && uv run torchrun --nproc_per_node=2 -m ddp_kit.train recipes/digits.py",
        "uv run pytest",
    ]


def test_readmes_first_command_is_quickstarts_but_for_the_run_directory() -> None:
    """Which the everyday tests run."""
    readmes = blocks(ROOT / "README.md")[0].commands.split()
    first = next(block for block in blocks(DOCS / "quickstart.md") if block.is_first)
    quickstarts = [word for word in first.commands.split() if word != "\\"]
    assert quickstarts == [*readmes, "--run-dir", "runs/first"]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text(page), re.DOTALL)


def test_the_recipe_of_the_pages_is_one(tmp_path: Path) -> None:
    file = tmp_path / "shown_recipe.py"
    file.write_text(python_blocks("recipe.md")[0])
    source = load_recipe(str(file))
    recipe = source.build(source.settings())
    assert recipe.model().fc.out_features == 10


@pytest.mark.slow
@pytest.mark.steady
def test_the_loop_of_the_pages_trains_and_goes_on(tmp_path: Path) -> None:
    loop, evaluation = python_blocks("own-loop.md")
    script = f"""
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import ddp_kit
from ddp_kit import LossSum
from ddp_kit.data.known import digits

dataset, steps = digits("train"), 20


def Net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def loss(model, batch):
    images, labels = batch
    return LossSum(cross_entropy(model(images), labels, reduction="sum"), len(labels))


torch.manual_seed(0)
{loop}
    ddp_kit.save(training, "runs/mine")
{indented(evaluation)}
print(training.step, metrics["loss"] < 2.3)
"""
    file = tmp_path / "loop.py"
    file.write_text(script)
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(file)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.stdout.split() == ["20", "True"], done.stderr


def indented(code: str) -> str:
    return "\n".join(f"    {line}" for line in code.splitlines())
