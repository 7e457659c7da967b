"""What is asked for on one machine, checked as a whole before anything starts.

Owns: the plan of a start on this machine, and what every plan says of its recipe. Refuses: starting anything.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


class LaunchError(Exception):
    """The start as asked for cannot be; the message says what to type. Exit code 2, as for any usage error."""

    exit_code = 2


def answered(verb: str, command: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    """Runs a verb on its words. Returns: its exit code; 2 with a message for a LaunchError, 1 for a file that cannot be read."""
    try:
        return command(sys.argv[1:] if argv is None else argv)
    except SystemExit as end:  # argparse has said what is wrong
        return int(end.code or 0)
    except LaunchError as error:
        print(f"ddp-kit {verb}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"ddp-kit {verb}: {error}", file=sys.stderr)
        return 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Ranks on this machine. `words` are the recipe and its flags, handed on as they are."""

    words: tuple[str, ...]
    processes: int = 1
    python: str = sys.executable

    def __post_init__(self) -> None:
        faults = recipe_faults(self.words, verb="run --nproc-per-node 2")
        if self.processes < 1:
            faults.append(f"--nproc-per-node {self.processes}: expected 1 or more, or auto")
        if faults:
            raise LaunchError("; ".join(faults) + ".")

    @property
    def command(self) -> list[str]:
        """What each rank runs."""
        return [self.python, "-m", "ddp_kit.train", *self.words]


def recipe_faults(words: Sequence[str], *, verb: str) -> list[str]:
    """Returns what is wrong with the words after the launcher's own flags: the recipe, then the recipe's flags."""
    if not words:
        return [f"the recipe is missing: ddp-kit {verb} RECIPE.py [recipe flags]"]
    if words[0].startswith("-"):
        return [
            f"{words[0]} is no flag of the launcher, and the recipe comes before its own flags. `ddp-kit {verb.split()[0]} --help`"
        ]
    path = Path(words[0])
    if (
        words[0].endswith(".py") or "/" in words[0] or path.exists()
    ):  # a file to ddp_kit too, and otherwise a module
        near = f". Did you mean {path}.py?" if Path(f"{path}.py").is_file() else ""
        if not path.is_file():
            return [f"{path} is not there (looked in {Path.cwd()}){near}"]
        return [] if path.suffix == ".py" else [f"{path}: expected a .py file{near}"]
    if not all(part.isidentifier() for part in words[0].split(".")):
        return [f"{words[0]}: expected a recipe's .py file, or the dotted name of a module"]
    return []


def processes_of(text: str, *, gpus: int) -> int:
    """Returns the ranks that `--nproc-per-node` asks for; `auto` is one for each of the visible GPUs, or one. Raises: LaunchError."""
    if text == "auto":
        return max(1, gpus)
    if not text.isdecimal():
        raise LaunchError(f"--nproc-per-node {text}: expected a number or auto.")
    return int(text)
