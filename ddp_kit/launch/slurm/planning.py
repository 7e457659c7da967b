"""From a command line to the plan of a batch job: its run directories, its code, its size."""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ddp_kit.launch.environment import python_paths
from ddp_kit.launch.local import accelerate
from ddp_kit.launch.plan import LaunchError, processes_of, recipe_faults
from ddp_kit.launch.runs.found import FoundRun
from ddp_kit.launch.slurm.command_line import (
    fields_of,
    parser,
    recipes_words,
    split_run_dir,
    with_recipe,
)
from ddp_kit.launch.slurm.plan import Run, SlurmPlan
from ddp_kit.launch.slurm.snapshot import Code, code_of, code_of_module


def planned(argv: Sequence[str]) -> tuple[SlurmPlan, argparse.Namespace]:
    """Returns the plan that the words of `ddp-kit slurm` ask for, and what was read.

    Raises: LaunchError with all faults.
    """
    reader = with_recipe(
        parser("slurm", what="Submits a recipe's ranks as a batch job that loses nothing.")
    )
    asked = reader.parse_args(argv)
    asked.words = recipes_words(asked.words, reader=reader)
    flags, run_dir = split_run_dir(asked.words[1:])
    if run_dir:
        home = Path(run_dir).absolute()
    elif asked.name or not asked.words:
        home = default_folder(asked.name)
    else:
        home = default_folder(Path(asked.words[0]).stem)
    asked.exclude = FoundRun(home).without_bad_nodes(asked.exclude)
    plan = plan_of(asked, runs=[(home, flags)], folder=home / "launch", home=home)
    return plan, asked


def default_folder(name: str) -> Path:
    """Returns a folder under runs/ that is not there yet: the name and the UTC time."""
    plain = re.sub(r"[^0-9A-Za-z_.-]+", "-", name)
    stem = f"{plain}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    path = Path("runs") / stem
    number = 0
    while path.exists():
        number += 1
        path = Path("runs") / f"{stem}-{number}"
    return path.absolute()


def plan_of(
    asked: argparse.Namespace,
    *,
    runs: Sequence[tuple[Path, Sequence[str]]],
    folder: Path,
    home: Path,
) -> SlurmPlan:
    """Returns the plan for runs, each (its folder, its flags).

    submitit's files go into `folder`, and the code's copy into `home`. Raises: LaunchError with
    all faults.
    """
    words = asked.words
    if not words or words[0].startswith("-"):
        raise LaunchError(recipe_faults(words, verb="slurm --nodes 2")[0] + ".")
    nodes, processes = _size(asked)
    chdir = Path.cwd()
    paths = python_paths(asked.env)
    code = None
    if not asked.no_snapshot:
        code = _code(words[0], copy=home / "code", paths=[str(chdir), *paths])
    snapshot = ""
    folders: tuple[str, ...] = ()
    if code is not None:
        snapshot = str(code.copy)
        folders = code.folders(chdir, paths=paths)
    recipe = _copied(words[0], code=code)
    return SlurmPlan(
        source=_source(words[0], code=code),
        runs=tuple(
            Run(folder=str(path), words=(recipe, *flags, "--run-dir", str(path)))
            for path, flags in runs
        ),
        folder=str(folder),
        name=asked.name or Path(words[0]).stem,
        chdir=str(chdir),
        snapshot=snapshot,
        code=folders,
        nodes=nodes,
        processes=processes,
        **fields_of(vars(asked)),
    )


def _size(asked: argparse.Namespace) -> tuple[int, int]:
    """Returns the nodes, and the ranks on each."""
    gpus = max(asked.gpus_per_node, 0)
    nodes = asked.nodes
    processes = None
    if asked.nproc_per_node is not None:
        processes = processes_of(asked.nproc_per_node, gpus=gpus)
    if asked.launcher == "accelerate" or asked.accelerate_config:
        config = accelerate.config_of(asked.accelerate_config, launcher=asked.launcher)
        nodes, processes = accelerate.agreed(processes, nodes=nodes, config=config)
    if nodes is None:
        nodes = 1
    if processes is None:
        processes = max(1, gpus)
    return nodes, processes


def _code(recipe: str, *, copy: Path, paths: Sequence[str]) -> Code | None:
    """The code of a recipe, a file or a module; None for a module that cannot be copied."""
    if recipe.endswith(".py"):
        return code_of(Path(recipe), copy=copy)
    return code_of_module(recipe, copy=copy, paths=paths)


def _copied(recipe: str, *, code: Code | None) -> str:
    """The recipe as the ranks get it: a module by its name, a file by its path in the copy."""
    if not recipe.endswith(".py"):
        return recipe
    if code is None:
        return str(Path(recipe).resolve())
    return str(code.copied_recipe)


def _source(recipe: str, *, code: Code | None) -> str:
    """The recipe's own file, if it can be told, else what was typed."""
    if Path(recipe).is_file():
        return str(Path(recipe).absolute())
    if code is not None and not recipe.endswith(".py"):
        return str(code.recipe)
    return recipe


def tell_if_uncopied(plan: SlurmPlan, *, asked: argparse.Namespace) -> None:
    """Says that there is no copy of a recipe, where nobody has asked for that.

    It is a module outside of any git repository.
    """
    if plan.snapshot or asked.no_snapshot:
        return
    print(
        f"{plan.source} is not copied: it is a module outside of any git repository, "
        "and runs where it lies, with every later edit. "
        "Name its file for a copy, or type --no-snapshot.",
        file=sys.stderr,
    )
