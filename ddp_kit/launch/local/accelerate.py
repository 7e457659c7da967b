"""accelerate as the launcher: `ddp-kit run --launcher accelerate RECIPE.py [recipe flags]`.

Of accelerate's configuration file only the numbers of machines and processes count: precision
and the like are flags of the recipe.
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from ddp_kit.launch.environment import become, environment, visible_gpus
from ddp_kit.launch.plan import LaunchError, Plan

COUNTS = ("num_machines", "num_processes")
# a plain line at the top level of YAML: NAME: 8, perhaps in quotes, perhaps with a comment
COUNT_LINE = re.compile(r"(\w+):\s*[\"']?(\d+)[\"']?\s*(?:#.*)?$")


def command(plan: Plan) -> list[str]:
    """Returns accelerate's command line.

    It states every choice, so that no configuration file of the user's changes it.
    """
    gpus = visible_gpus()
    kinds = []
    if plan.processes > 1 and gpus > 1:
        kinds = ["--multi_gpu"]
    elif gpus < 2:
        kinds = ["--cpu"]
    return [
        plan.python,
        "-m",
        "accelerate.commands.launch",
        "--num_machines=1",
        f"--num_processes={plan.processes}",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port=0",
        *kinds,
        "-m",
        "ddp_kit.train",
        *plan.words,
    ]


def run(plan: Plan) -> NoReturn:
    """Becomes accelerate's launcher. Raises: LaunchError if accelerate is not installed."""
    require_accelerate()
    become(command(plan))


def require_accelerate() -> None:
    """Raises: LaunchError if accelerate is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise LaunchError("--launcher accelerate needs accelerate: pip install accelerate.")


def default_config(environ: Mapping[str, str] | None = None) -> Path:
    """Returns where `accelerate config` leaves its file."""
    if environ is None:
        environ = environment()
    cache = Path(environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    home = Path(environ.get("HF_HOME", cache / "huggingface")).expanduser()
    return home / "accelerate" / "default_config.yaml"


def config_of(named: str | None, *, launcher: str) -> Path:
    """Returns the file that `--accelerate-config` names, else accelerate's own.

    Raises: LaunchError if it is not there, or has no effect because of another launcher.
    """
    if not named:
        return default_config()
    if launcher != "accelerate":
        raise LaunchError(
            f"--accelerate-config {named}: it has no effect without --launcher accelerate."
        )
    if not Path(named).is_file():
        raise LaunchError(
            f"--accelerate-config {named}: there is no such file. "
            f"`accelerate config --config_file {named}` writes one."
        )
    return Path(named)


def counts(path: Path) -> dict[str, int]:
    """Returns the machines and processes (of all machines) that a configuration file names.

    {} if there is no such file.
    """
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = COUNT_LINE.match(line)
        if match and match[1] in COUNTS:
            found[match[1]] = int(match[2])
    return found


def agreed(asked: int | None, *, nodes: int | None, config: Path) -> tuple[int | None, int | None]:
    """Returns (nodes, processes on each): what the flags say, and where they say nothing the file.

    Raises: LaunchError where the two contradict each other.
    """
    named = counts(config)
    machines = named.get("num_machines")
    processes = named.get("num_processes")
    faults = []
    if nodes is None:
        nodes = machines
    elif machines is not None and nodes != machines:
        faults.append(f"{nodes} node(s) were asked for, and {config} says num_machines: {machines}")
    if processes is not None:
        sharing = nodes or 1
        if processes % sharing:
            faults.append(
                f"{config} says num_processes: {processes}, "
                f"which {nodes} machines cannot share evenly"
            )
        elif asked is None:
            asked = processes // sharing
        elif asked * sharing != processes:
            faults.append(
                f"--nproc-per-node {asked} makes {asked * sharing} processes, "
                f"and {config} says num_processes: {processes}"
            )
    if faults:
        raise LaunchError("; ".join(faults) + ". Change the flags, or that file.")
    return nodes, asked
