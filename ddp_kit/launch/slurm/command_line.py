"""The flags of the verbs that make batch jobs, up to the recipe, and its words after them."""

import argparse
import ast
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.slurm.plan import LAUNCHERS

TEXTS = (
    "time",
    "partition",
    "qos",
    "account",
    "constraint",
    "exclude",
    "nodelist",
    "dependency",
    "container-image",
    "container-mounts",
)
LISTS = {"env": "NAME=VALUE", "env-preset": "NAME", "setup": "LINE", "sbatch": "K=V", "srun": "K=V"}
LIST_FIELDS = {"env-preset": "preset"}
# flags whose fields have the same name
SAME = (
    "launcher",
    "min_nodes",
    "gpus_per_node",
    "cpus_per_task",
    "max_restarts",
    "max_requeues",
    "warn_s",
    "python",
    "parallel",
)


def parser(verb: str, *, what: str) -> argparse.ArgumentParser:
    """Returns the reader of a verb's flags, with those that every batch job has."""
    made = argparse.ArgumentParser(f"ddp-kit {verb}", description=what, allow_abbrev=False)
    _add_sizes(made)
    for name in TEXTS:
        made.add_argument(f"--{name}", default="")
    _add_restarts(made)
    for name, metavar in LISTS.items():
        made.add_argument(
            f"--{name}", action="append", default=[], metavar=metavar, help="may be repeated"
        )
    made.add_argument(
        "--accelerate-config",
        metavar="FILE",
        help="accelerate's YAML; default: the one that `accelerate config` has left",
    )
    made.add_argument("--python", default=sys.executable, help="on the nodes")
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="print the script that would be submitted, and do nothing",
    )
    return made


def _add_sizes(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        default="srun",
        help="one task a rank (srun), or an agent on each node",
    )
    made.add_argument("--nodes", type=int, help="default 1")
    made.add_argument(
        "--nproc-per-node",
        "--nproc_per_node",
        metavar="N",
        help="ranks on a node; default: its GPUs, or one",
    )
    made.add_argument("--gpus-per-node", type=int, default=0)
    made.add_argument("--cpus-per-task", type=int, default=0, help="of a rank")
    made.add_argument("--mem", default="", help="of a node, for instance 64G")


def _add_restarts(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "--min-nodes",
        type=int,
        default=0,
        metavar="N",
        help="torchrun only: go on with N when others have died",
    )
    made.add_argument(
        "--max-restarts", type=int, default=0, help="by torchrun, inside one life of the job"
    )
    made.add_argument(
        "--max-requeues",
        type=int,
        default=20,
        help="lives after the first one; 0: it is never requeued",
    )
    made.add_argument(
        "--warn-s",
        type=int,
        default=120,
        help="seconds before the time limit at which the ranks are told to save",
    )


def with_recipe(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Returns a verb's reader with the flags of a first submission, up to the recipe's own."""
    made.add_argument("--name", default="", help="of the job; default: the recipe's")
    made.add_argument(
        "--no-snapshot",
        action="store_true",
        help="run the code where it lies, with every later edit",
    )
    made.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="RECIPE.py [recipe flags]",
        help="`RECIPE.py --help` lists its flags",
    )
    return made


def fields_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what flags say as values of a plan's fields.

    Nodes and ranks on a node are left to the caller.
    """
    fields = {}
    for name in (*SAME, *(text.replace("-", "_") for text in TEXTS)):
        if name in given:
            fields[name] = given[name]
    for flag in LISTS:
        name = flag.replace("-", "_")
        if name in given:
            fields[LIST_FIELDS.get(flag, flag)] = tuple(given[name])
    if "mem" in given:
        fields["memory"] = given["mem"]
    return fields


def split_run_dir(words: Sequence[str]) -> tuple[list[str], str]:
    """Returns the words without `--run-dir` and its value, and that value, "" if there is none."""
    kept = []
    found = ""
    rest = iter(words)
    for word in rest:
        if word == "--run-dir":
            found = next(rest, "")
        elif word.startswith("--run-dir="):
            found = word.partition("=")[2]
        else:
            kept.append(word)
    return kept, found


def recipes_words(words: Sequence[str], *, reader: argparse.ArgumentParser) -> list[str]:
    """Returns the recipe and its flags, without a "--" between them.

    What follows that one is the recipe's, whatever its name.

    Raises: LaunchError for --help and for a launcher's flag behind the recipe, which the job alone
    would answer or refuse. A field of that name that the recipe's own file declares makes it the
    recipe's; what it inherits cannot be seen from here.
    """
    if words[1:2] == ["--"]:
        return [words[0], *words[2:]]
    if {"-h", "--help"} & set(words[1:]):
        raise LaunchError(
            f"{words[0]}'s own flags are listed by `ddp-kit run {words[0]} --help`, "
            f"these by `{reader.prog} --help`."
        )
    if words and words[0].endswith(".py") and Path(words[0]).is_file():
        _require_recipes(words[1:], path=Path(words[0]), reader=reader)
    return list(words)


def _require_recipes(words: Sequence[str], *, path: Path, reader: argparse.ArgumentParser) -> None:
    """Raises: LaunchError for a flag of the launcher's among those of the recipe in that file."""
    launchers = vars(reader.parse_args([])).keys() - {"words"}
    launchers -= _fields_in(path.read_text(encoding="utf-8", errors="replace"))
    for word in words:
        flag = word.partition("=")[0]
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in launchers:
            raise LaunchError(
                f"{flag} comes after the recipe, where flags are the recipe's own, "
                f"and {path} has no field {name}. "
                f"Type it before: {reader.prog} {flag} ... {path}. "
                f"If the recipe inherits it: {reader.prog} ... {path} -- {flag} ..."
            )


def _fields_in(source: str) -> set[str]:
    """The names that classes of a Python file annotate.

    None if it is not Python, which `ddp_kit.train` will say.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return set()
    fields = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                fields.add(line.target.id)
    return fields
