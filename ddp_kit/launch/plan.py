"""What is asked for on one machine, checked as a whole before anything starts."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class LaunchError(Exception):
    """The start as asked for cannot be; the message says what to type.

    Exit code 2, as for any usage error.
    """

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Ranks on this machine. `words` are the recipe and its flags, handed on as they are.

    Raises: LaunchError with all that is wrong with them.
    """

    words: tuple[str, ...]
    processes: int = 1
    python: str = sys.executable
    # What each rank runs. Only of `ddp_kit.train` the first word is a recipe.
    module: str = "ddp_kit.train"

    def __post_init__(self) -> None:
        faults = []
        if self.module == "ddp_kit.train":
            faults = recipe_faults(self.words, verb="run --nproc-per-node 2")
        if self.processes < 1:
            faults.append(f"--nproc-per-node {self.processes}: expected 1 or more, or auto")
        if faults:
            raise LaunchError("; ".join(faults) + ".")

    @property
    def command(self) -> list[str]:
        """What each rank runs."""
        return [self.python, "-m", self.module, *self.words]


def recipe_faults(words: Sequence[str], *, verb: str) -> list[str]:
    """Returns what is wrong with the words after the launcher's flags: a recipe, then its flags."""
    if not words:
        return [f"the recipe is missing: ddp-kit {verb} RECIPE.py [recipe flags]"]
    word = words[0]
    if word.startswith("-"):
        return [
            f"{word} is no flag of the launcher, and the recipe comes before its own flags. "
            f"`ddp-kit {verb.split()[0]} --help`"
        ]
    # ddp_kit takes it for a file by the same rule, and otherwise for a module
    if word.endswith(".py") or "/" in word or Path(word).exists():
        return _file_faults(Path(word))
    if not all(part.isidentifier() for part in word.split(".")):
        return [f"{word}: expected a recipe's .py file, or the dotted name of a module"]
    return []


def _file_faults(path: Path) -> list[str]:
    near = ""
    if Path(f"{path}.py").is_file():
        near = f". Did you mean {path}.py?"
    if not path.is_file():
        return [f"{path} is not there (looked in {Path.cwd()}){near}"]
    if path.suffix != ".py":
        return [f"{path}: expected a .py file{near}"]
    return []


def processes_of(text: str, *, gpus: int) -> int:
    """Returns the ranks that `--nproc-per-node` asks for.

    `auto` is one for each of the visible GPUs, or one. Raises: LaunchError for another word.
    """
    if text == "auto":
        return max(1, gpus)
    if not text.isdecimal():
        raise LaunchError(f"--nproc-per-node {text}: expected a number or auto.")
    return int(text)
