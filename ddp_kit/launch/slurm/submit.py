"""`ddp-kit slurm [flags] RECIPE.py [recipe flags]`: a batch job; and the same from Python as `submit(plan)`.

Owns: the command line up to the recipe, and the order of things at a submission. Refuses: rendering, copying and asking SLURM itself.
"""

import argparse
import ast
import dataclasses
import importlib.util
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_kit.launch.environment import outside_job, python_paths
from ddp_kit.launch.local import accelerate
from ddp_kit.launch.plan import LaunchError, answered, processes_of, recipe_faults
from ddp_kit.launch.runs.found import FoundRun
from ddp_kit.launch.slurm import cluster
from ddp_kit.launch.slurm.plan import LAUNCHERS, Run, SlurmPlan
from ddp_kit.launch.slurm.script import render, variables
from ddp_kit.launch.slurm.snapshot import code_of, code_of_module

if TYPE_CHECKING:
    from submitit import Job

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
    for name in TEXTS:
        made.add_argument(f"--{name}", default="")
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


def with_recipe(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Returns a verb's reader with the flags of a first submission, up to the recipe and its own."""
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
    """Returns what flags say as values of a plan's fields; ranks on a node are left to the caller."""
    same = {
        name: given[name]
        for name in (*SAME, *(name.replace("-", "_") for name in TEXTS))
        if name in given
    }
    lists = {
        LIST_FIELDS.get(name, name): tuple(given[name.replace("-", "_")])
        for name in LISTS
        if name.replace("-", "_") in given
    }
    return {**same, **lists, **({"memory": given["mem"]} if "mem" in given else {})}


def split_run_dir(words: Sequence[str]) -> tuple[list[str], str]:
    """Returns the words without `--run-dir` and its value, and that value, "" if there is none."""
    kept, found = [], ""
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
    """Returns the recipe and its flags, without a "--" between them: what follows that one is the recipe's, whatever its name.

    Raises: LaunchError for --help and for a launcher's flag behind the recipe, which the job alone would answer or refuse. A field
    of that name that the recipe's own file declares makes it the recipe's; what it inherits `launch` cannot see.
    """
    path = Path(words[0]) if words else Path()
    if words[1:2] == ["--"]:
        return [words[0], *words[2:]]
    if {"-h", "--help"} & set(words[1:]):
        raise LaunchError(
            f"{words[0]}'s own flags are listed by `ddp-kit run {words[0]} --help`, these by `{reader.prog} --help`."
        )
    if not (path.suffix == ".py" and path.is_file()):
        return list(words)
    fields = _fields_in(path.read_text(encoding="utf-8", errors="replace"))
    for flag in (word.partition("=")[0] for word in words[1:] if word.startswith("--")):
        name = flag[2:].replace("-", "_")
        if name != "words" and name in vars(reader.parse_args([])) and name not in fields:
            raise LaunchError(
                f"{flag} comes after the recipe, where flags are the recipe's own, and {path} has no field {name}. "
                f"Type it before: {reader.prog} {flag} ... {path}. If the recipe inherits it: {reader.prog} ... {path} -- {flag} ..."
            )
    return list(words)


def _fields_in(source: str) -> set[str]:
    """The names that classes of a Python file annotate; none if it is not Python, which `ddp_kit.train` will say."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return set()
    lines = [
        line for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for line in node.body
    ]
    return {
        line.target.id
        for line in lines
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


def plan_of(
    asked: argparse.Namespace,
    *,
    runs: Sequence[tuple[Path, Sequence[str]]],
    folder: Path,
    home: Path,
) -> SlurmPlan:
    """Returns the plan for runs, each (its folder, its flags), with submitit's `folder`; the code's copy is in `home`.

    Raises: LaunchError with all faults.
    """
    words, gpus = asked.words, max(asked.gpus_per_node, 0)
    if not words or words[0].startswith("-"):
        raise LaunchError(recipe_faults(words, verb="slurm --nodes 2")[0] + ".")
    nodes, each = (
        asked.nodes,
        None if asked.nproc_per_node is None else processes_of(asked.nproc_per_node, gpus=gpus),
    )
    if asked.launcher == "accelerate" or asked.accelerate_config:
        nodes, each = accelerate.agreed(
            each,
            nodes=nodes,
            config=accelerate.config_of(asked.accelerate_config, launcher=asked.launcher),
        )
    is_file, chdir, paths, code = (
        words[0].endswith(".py"),
        Path.cwd(),
        python_paths(asked.env),
        None,
    )
    if is_file and not asked.no_snapshot:
        code = code_of(Path(words[0]), copy=home / "code")
    elif not asked.no_snapshot:
        code = code_of_module(words[0], copy=home / "code", paths=[str(chdir), *paths])
    recipe = (
        words[0] if not is_file else str(code.copied_recipe if code else Path(words[0]).resolve())
    )
    return SlurmPlan(
        source=str(Path(words[0]).absolute())
        if Path(words[0]).is_file()
        else str(code.recipe)
        if code and not is_file
        else words[0],
        runs=tuple(
            Run(folder=str(path), words=(recipe, *flags, "--run-dir", str(path)))
            for path, flags in runs
        ),
        folder=str(folder),
        name=asked.name or Path(words[0]).stem,
        chdir=str(chdir),
        snapshot=str(code.copy) if code else "",
        code=code.folders(chdir, paths=paths) if code else (),
        nodes=1 if nodes is None else nodes,
        processes=max(1, gpus) if each is None else each,
        **fields_of(vars(asked)),
    )


def tell_if_uncopied(plan: SlurmPlan, *, asked: argparse.Namespace) -> None:
    """Says of a recipe that there is no copy of it, where nobody has asked for that: it is a module outside of any git repository."""
    if not plan.snapshot and not asked.no_snapshot:
        why = "it is a module outside of any git repository, and runs where it lies, with every later edit"
        print(
            f"{plan.source} is not copied: {why}. Name its file for a copy, or type --no-snapshot.",
            file=sys.stderr,
        )


def submit(plan: SlurmPlan, *, copies: bool = True) -> "Job[str]":
    """Submits a plan of one run. Returns: submitit's `Job`. Otherwise as `submit_runs`."""
    return submit_runs(plan, copies=copies)[0]


def submit_runs(plan: SlurmPlan, *, copies: bool = True) -> "list[Job[str]]":
    """Copies the code (without `copies` only if it never was), and submits the plan as one job. Returns: submitit's `Job` of each run.

    Raises: LaunchError if the cluster has no such partition, GPUs or time, a run directory is in use or cannot be written, or sbatch
    refuses it.
    """
    cluster.require_fits(plan)
    for run in plan.runs:
        FoundRun(Path(run.folder)).require_free()
    homes = [Path(run.folder) / "launch" for run in plan.runs]
    try:
        for path in (Path(plan.folder), *homes):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            f"{error.filename}: cannot be written ({error.strerror}). Type another --run-dir."
        ) from error
    if plan.snapshot and (copies or not Path(plan.snapshot).exists()):
        code_of(Path(plan.source), copy=Path(plan.snapshot)).take()
    if importlib.util.find_spec("submitit") is None:
        raise LaunchError("submitting needs submitit: pip install 'ddp_kit[slurm]'.")
    from ddp_kit.launch.slurm.executor import Executor

    name = cluster.submitted_to(plan)
    with outside_job(without=variables(plan)):
        jobs = Executor(plan).submit_plan()
    for run, home, job in zip(plan.runs, homes, jobs, strict=True):
        (home / "plan.json").write_text(
            dataclasses.replace(plan, runs=(run,)).to_json(), encoding="utf-8"
        )
        with (home / "jobs.jsonl").open("a", encoding="utf-8") as file:
            record = {
                "job": job.job_id,
                "time": time.time(),
                "folder": plan.folder,
                "cluster": name,
            }
            file.write(json.dumps(record) + "\n")
    return jobs


def default_folder(name: str) -> Path:
    """Returns a folder under runs/ that is not there yet: the name and the UTC time."""
    stem = (
        f"{re.sub(r'[^0-9A-Za-z_.-]+', '-', name)}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    )
    taken = (Path("runs") / (stem + (f"-{number}" if number else "")) for number in range(1000))
    return next(path for path in taken if not path.exists()).absolute()


def planned(argv: Sequence[str]) -> tuple[SlurmPlan, argparse.Namespace]:
    """Returns the plan that a command line asks for, and what was read. Raises: LaunchError with all faults."""
    reader = with_recipe(
        parser("slurm", what="Submits a recipe's ranks as a batch job that loses nothing.")
    )
    asked = reader.parse_args(argv)
    asked.words = recipes_words(asked.words, reader=reader)
    flags, named = split_run_dir(asked.words[1:])
    home = (
        Path(named).absolute()
        if named
        else default_folder(asked.name or Path(asked.words[0] if asked.words else "").stem)
    )
    asked.exclude = FoundRun(home).without_bad_nodes(asked.exclude)
    return plan_of(asked, runs=[(home, flags)], folder=home / "launch", home=home), asked


def _main(argv: Sequence[str]) -> int:
    plan, asked = planned(argv)
    tell_if_uncopied(plan, asked=asked)
    if asked.dry_run:
        print(render(plan), end="")
        return 0
    job = submit(plan)
    print(
        f"job {job.job_id}: {plan.runs[0].folder}\nddp-kit jobs · ddp-kit logs {job.job_id} -f · ddp-kit cancel {job.job_id}"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns: 0 once the job is submitted, 2 if it is refused."""
    return answered("slurm", _main, argv)


if __name__ == "__main__":
    sys.exit(main())
