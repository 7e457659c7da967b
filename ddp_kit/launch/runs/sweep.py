"""`ddp-kit sweep --grid lr=0.1,0.2 --grid seed=0,1 [slurm flags] RECIPE.py [recipe flags]`.

A run for each point of a grid: one job array or, without SLURM, here one after another. Results
are not looked at here; `--show` hands that to `ddp_kit.cli.sweep`.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddp_kit.io.atomic import make_private_folder
from ddp_kit.io.logs import patient_output
from ddp_kit.launch.environment import has_slurm, visible_gpus
from ddp_kit.launch.local import processes as local
from ddp_kit.launch.plan import LaunchError, Plan, processes_of, recipe_faults
from ddp_kit.launch.private_file import write_private
from ddp_kit.launch.runs.grid import Point, flags_of, folder_of, points_of
from ddp_kit.launch.slurm.command_line import parser, recipes_words, split_run_dir, with_recipe
from ddp_kit.launch.slurm.planning import default_folder, plan_of, tell_if_uncopied
from ddp_kit.launch.slurm.script import render
from ddp_kit.launch.slurm.submit import submit_runs
from ddp_kit.launch.verbs import verb

# flags that mean something without SLURM
HERE = {"nodes", "nproc_per_node", "words", "name", "grid", "here", "python", "dry_run"}
# exit codes after which the next point is not begun: a signal to one run ends the sweep
STOPPED = (75, 130, 143)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A recipe, the flags that all points have, and the points, each with a folder in `home`."""

    recipe: str
    flags: Sequence[str]
    home: Path
    points: Sequence[Point]

    def run_dir(self, point: Point) -> Path:
        """A point's run directory."""
        return self.home / folder_of(point)

    def words(self, point: Point) -> list[str]:
        """What a point's run gets, its directory apart."""
        return [*self.flags, *flags_of(point)]


def claim(sweep: Sweep) -> None:
    """Makes a sweep's folder. Raises: LaunchError if it holds another sweep; the same goes on."""
    home = sweep.home
    path = home / "sweep.json"
    runs = {folder_of(point): point for point in sweep.points}
    text = json.dumps({"runs": runs}, indent=1) + "\n"
    try:
        make_private_folder(home)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise LaunchError(f"{home}: holds a sweep over another grid. Type another --name.")
        # a point's values may be secrets
        write_private(path, text)
    except OSError as error:
        raise LaunchError(f"{home}: cannot be written ({error.strerror}).") from error


def commands_here(sweep: Sweep, *, processes: int) -> list[str]:
    """Returns what one would type to train the points on this machine, as `run_here` does."""
    start = ["ddp-kit", "run", "--nproc-per-node", str(processes), sweep.recipe]
    commands = []
    for point in sweep.points:
        run_dir = str(sweep.run_dir(point))
        commands.append(shlex.join([*start, *sweep.words(point), "--run-dir", run_dir]))
    return commands


def run_here(sweep: Sweep, *, processes: int, python: str) -> int:
    """Trains one point after another on this machine; those that are finished already say so.

    Returns: the first exit code but 0.
    """
    number_of_points = len(sweep.points)
    codes: dict[str, int] = {}
    with patient_output():
        for number, point in enumerate(sweep.points, 1):
            run_dir = sweep.run_dir(point)
            print(f"{number} of {number_of_points}: {run_dir}", flush=True)
            words = (sweep.recipe, *sweep.words(point), "--run-dir", str(run_dir))
            code = local.run(Plan(words=words, processes=processes, python=python))
            codes[folder_of(point)] = code
            if code in STOPPED:
                break
        failed = [name for name, code in codes.items() if code]
        text = f"{len(codes) - len(failed)} of {number_of_points} finished"
        if failed:
            text += f"; not: {', '.join(failed)}"
        print(text)
    return next((code for code in codes.values() if code), 0)


def show(name: str) -> int:
    """Prints a sweep's table and plot. Returns: 0. Raises: LaunchError if there is no such one."""
    for home in (Path(name), Path("runs") / name):
        if (home / "sweep.json").exists():
            command = [sys.executable, "-m", "ddp_kit.cli.sweep", str(home)]
            return subprocess.run(command, check=False).returncode
    known = sorted(path.parent.name for path in Path("runs").glob("*/sweep.json"))
    advice = "Type the folder that it was started in."
    if known:
        advice = f"In runs/: {', '.join(known)}."
    raise LaunchError(f"{name}: no sweep. {advice}")


def _parser() -> argparse.ArgumentParser:
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
    return reader


def _sweep_of(asked: argparse.Namespace) -> Sweep:
    """Returns the sweep that is asked for. Raises: LaunchError with what is wrong with it."""
    faults = recipe_faults(asked.words, verb="sweep --grid lr=0.1,0.2")
    if faults:
        raise LaunchError("; ".join(faults) + ".")
    points = points_of(asked.grid)
    flags, run_dir = split_run_dir(asked.words[1:])
    if run_dir:
        raise LaunchError(
            f"--run-dir {run_dir}: a sweep's runs have folders of their own. "
            "Type --name NAME, for runs/NAME."
        )
    recipe = asked.words[0]
    if asked.name:
        home = (Path("runs") / asked.name).absolute()
    else:
        home = default_folder(Path(recipe).stem)
    return Sweep(recipe=recipe, flags=flags, home=home, points=points)


def _here(sweep: Sweep, asked: argparse.Namespace, *, reader: argparse.ArgumentParser) -> int:
    """The sweep on this machine. Raises: LaunchError for flags that mean nothing here."""
    typed = {name for name, value in vars(asked).items() if value != reader.get_default(name)}
    needless = typed - HERE
    if not needless and (asked.nodes or 1) > 1:
        needless = {"nodes"}
    if needless:
        what = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(needless))
        raise LaunchError(
            f"{what}: means something to SLURM only, and this sweep runs here. Leave it out."
        )
    processes = processes_of(asked.nproc_per_node or "auto", gpus=visible_gpus())
    if asked.dry_run:
        print("\n".join(commands_here(sweep, processes=processes)))
        return 0
    claim(sweep)
    return run_here(sweep, processes=processes, python=asked.python)


def _by_slurm(sweep: Sweep, asked: argparse.Namespace) -> int:
    """The sweep as a job array."""
    home = sweep.home
    runs = [(sweep.run_dir(point), sweep.words(point)) for point in sweep.points]
    plan = plan_of(asked, runs=runs, folder=home / "launch", home=home)
    tell_if_uncopied(plan, asked=asked)
    if asked.dry_run:
        print(render(plan), end="")
        return 0
    claim(sweep)
    jobs = submit_runs(plan)
    array = jobs[0].job_id.split("_")[0]
    print(f"job {array}, {len(jobs)} points: {home}")
    print(f"ddp-kit jobs {shlex.quote(str(home))} · ddp-kit sweep --show {shlex.quote(home.name)}")
    return 0


@verb("sweep")
def main(argv: Sequence[str]) -> int:
    """The command.

    Returns: 0 once it is submitted, or here the first exit code but 0; 2 for usage.
    """
    reader = _parser()
    asked = reader.parse_args(argv)
    if asked.show:
        return show(asked.show)
    asked.words = recipes_words(asked.words, reader=reader)
    sweep = _sweep_of(asked)
    if asked.here or not has_slurm():
        return _here(sweep, asked, reader=reader)
    return _by_slurm(sweep, asked)


if __name__ == "__main__":
    sys.exit(main())
