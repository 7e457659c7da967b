"""`ddp-kit sweep --grid lr=0.1,0.2 --grid seed=0,1 [slurm flags] RECIPE.py [recipe flags]`: a run for each point of a grid.

Owns: the points, their folders, and whether they are one job array or, without SLURM, run here one after another.
Refuses: looking at results; `--show` hands that to `ddp_kit.cli.sweep`.
"""

import argparse
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ddp_kit.launch.local import processes as local
from ddp_kit.launch.environment import has_slurm, visible_gpus
from ddp_kit.launch.plan import LaunchError, Plan, answered, processes_of, recipe_faults
from ddp_kit.launch.slurm.script import render
from ddp_kit.launch.slurm.submit import (
    default_folder,
    parser,
    plan_of,
    recipes_words,
    split_run_dir,
    submit_runs,
    tell_if_uncopied,
    with_recipe,
)

HERE = {
    "nodes",
    "nproc_per_node",
    "words",
    "name",
    "grid",
    "here",
    "python",
    "dry_run",
}  # flags that mean something without SLURM
STOPPED = (75, 130, 143)  # a signal to one run ends the sweep
Point = Mapping[str, str]


def points_of(grids: Sequence[str]) -> list[dict[str, str]]:
    """Returns every combination of `NAME=V1,V2,...`, the last name changing fastest. Raises: LaunchError with all faults."""
    axes: dict[str, list[str]] = {}
    faults = []
    for grid in grids:
        name, equals, values = grid.partition("=")
        if not equals or not name or not all(values.split(",")):
            faults.append(
                f"--grid {grid}: expected a flag of the recipe and its values, for instance --grid lr=0.1,0.2"
            )
        elif name.replace("_", "-") == "run-dir":
            faults.append(
                f"--grid {grid}: the points have folders of their own. --name NAME puts them into runs/NAME"
            )
        elif name in axes:
            faults.append(f"--grid {name} is given twice")
        axes[name] = list(dict.fromkeys(values.split(",")))
        if len({folder_of({name: value}) for value in axes[name]}) < len(axes[name]):
            faults.append(f"--grid {grid}: some of these values make the same folder name")
    if not grids:
        faults.append("--grid is missing: ddp-kit sweep --grid lr=0.1,0.2 RECIPE.py")
    if faults:
        raise LaunchError("; ".join(faults) + ".")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def folder_of(point: Point) -> str:
    """Returns the name of a point's run directory."""
    return re.sub(r"[/%\\\n]", "_", ",".join(f"{name}={value}" for name, value in point.items()))


def flags_of(point: Point) -> list[str]:
    """Returns a point as flags of the recipe."""
    return [word for name, value in point.items() for word in (f"--{name}", value)]


def claim(home: Path, points: Sequence[Point]) -> None:
    """Makes a sweep's folder. Raises: LaunchError if it holds another sweep; the same one goes on."""
    path = home / "sweep.json"
    text = json.dumps({"runs": {folder_of(point): point for point in points}}, indent=1) + "\n"
    try:
        home.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise LaunchError(f"{home}: holds a sweep over another grid. Type another --name.")
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LaunchError(f"{home}: cannot be written ({error.strerror}).") from error


def commands_here(
    asked: argparse.Namespace, *, home: Path, points: Sequence[Point], flags: Sequence[str]
) -> list[str]:
    """Returns what one would type to train the points one by one on this machine, as `run_here` does."""
    start = [
        "ddp-kit",
        "run",
        "--nproc-per-node",
        str(processes_of(asked.nproc_per_node or "auto", gpus=visible_gpus())),
        asked.words[0],
    ]
    return [
        shlex.join([*start, *flags, *flags_of(point), "--run-dir", str(home / folder_of(point))])
        for point in points
    ]


def run_here(
    asked: argparse.Namespace, *, home: Path, points: Sequence[Point], flags: Sequence[str]
) -> int:
    """Trains one point after another on this machine; those that are finished already say so. Returns: the first exit code but 0."""
    processes = processes_of(asked.nproc_per_node or "auto", gpus=visible_gpus())
    codes = []
    for number, point in enumerate(points, 1):
        run_dir = home / folder_of(point)
        print(f"{number} of {len(points)}: {run_dir}", flush=True)
        words = (asked.words[0], *flags, *flags_of(point), "--run-dir", str(run_dir))
        codes.append(local.run(Plan(words=words, processes=processes, python=asked.python)))
        if codes[-1] in STOPPED:
            break
    failed = [folder_of(point) for point, code in zip(points, codes, strict=False) if code]
    print(
        f"{len(codes) - len(failed)} of {len(points)} finished{'; not: ' + ', '.join(failed) if failed else ''}"
    )
    return next((code for code in codes if code), 0)


def show(name: str) -> int:
    """Prints a sweep's table and plot. Returns: 0. Raises: LaunchError if there is no such sweep."""
    homes = [path for path in (Path(name), Path("runs") / name) if (path / "sweep.json").exists()]
    if not homes:
        known = ", ".join(sorted(path.parent.name for path in Path("runs").glob("*/sweep.json")))
        raise LaunchError(
            f"{name}: no sweep. {f'In runs/: {known}.' if known else 'Type the folder that it was started in.'}"
        )
    return subprocess.run(
        [sys.executable, "-m", "ddp_kit.cli.sweep", str(homes[0])], check=False
    ).returncode


def _main(argv: Sequence[str]) -> int:
    reader = with_recipe(
        parser(
            "sweep",
            what="A run for each point of a grid: one job array, or here one after another.",
        )
    )
    reader.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=V1,V2",
        help="a flag of the recipe and its values; may be repeated",
    )
    reader.add_argument(
        "--parallel",
        type=int,
        default=0,
        help="points at a time; 0: as many as the cluster has room for",
    )
    reader.add_argument("--here", action="store_true", help="on this machine, SLURM or not")
    reader.add_argument("--show", metavar="NAME", help="a table and a plot of a sweep's results")
    asked = reader.parse_args(argv)
    if asked.show:
        return show(asked.show)
    asked.words = recipes_words(asked.words, reader=reader)
    if faults := recipe_faults(asked.words, verb="sweep --grid lr=0.1,0.2"):
        raise LaunchError("; ".join(faults) + ".")
    points = points_of(asked.grid)
    flags, named = split_run_dir(asked.words[1:])
    if named:
        raise LaunchError(
            f"--run-dir {named}: a sweep's runs have folders of their own. Type --name NAME, for runs/NAME."
        )
    home = (
        (Path("runs") / asked.name).absolute()
        if asked.name
        else default_folder(Path(asked.words[0]).stem)
    )
    if asked.here or not has_slurm():
        typed = {name for name, value in vars(asked).items() if value != reader.get_default(name)}
        if (needless := typed - HERE) or (asked.nodes or 1) > 1:
            what = ", ".join(
                f"--{name.replace('_', '-')}" for name in sorted(needless or {"nodes"})
            )
            raise LaunchError(
                f"{what}: means something to SLURM only, and this sweep runs here. Leave it out."
            )
        if asked.dry_run:
            print("\n".join(commands_here(asked, home=home, points=points, flags=flags)))
            return 0
        claim(home, points)
        return run_here(asked, home=home, points=points, flags=flags)
    runs = [(home / folder_of(point), [*flags, *flags_of(point)]) for point in points]
    plan = plan_of(asked, runs=runs, folder=home / "launch", home=home)
    tell_if_uncopied(plan, asked=asked)
    if asked.dry_run:
        print(render(plan), end="")
        return 0
    claim(home, points)
    jobs = submit_runs(plan)
    array = jobs[0].job_id.split("_")[0]
    print(
        f"job {array}, {len(jobs)} points: {home}\nddp-kit jobs {shlex.quote(str(home))} · ddp-kit sweep --show {shlex.quote(home.name)}"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns: 0 once it is submitted, or here the first exit code but 0; 2 for usage."""
    return answered("sweep", _main, argv)


if __name__ == "__main__":
    sys.exit(main())
