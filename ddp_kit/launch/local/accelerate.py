"""accelerate as the launcher: `ddp-kit run --launcher accelerate --nproc-per-node 8 RECIPE.py [recipe flags]`.

Owns: accelerate's command line, and what its configuration file says of machines and processes.
Refuses: the rest of that file; precision and the like are flags of the recipe.
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from ddp_kit.launch.environment import become, environment, visible_gpus
from ddp_kit.launch.plan import LaunchError, Plan

COUNTS = ("num_machines", "num_processes")


def command(plan: Plan) -> list[str]:
    """Returns accelerate's command line, with every choice stated, so that no configuration file of the user's changes it."""
    agent = [
        plan.python,
        "-m",
        "accelerate.commands.launch",
        "--num_machines=1",
        f"--num_processes={plan.processes}",
    ]
    gpus = visible_gpus()
    kinds = ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    kinds += ["--multi_gpu"] if plan.processes > 1 and gpus > 1 else ["--cpu"] if gpus < 2 else []
    return [*agent, *kinds, "-m", "ddp_kit.train", *plan.words]


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
    environ = environment() if environ is None else environ
    cache = Path(environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return (
        Path(environ.get("HF_HOME", cache / "huggingface")).expanduser()
        / "accelerate"
        / "default_config.yaml"
    )


def config_of(named: str | None, *, launcher: str) -> Path:
    """Returns the file that `--accelerate-config` names, else accelerate's own. Raises: LaunchError if it is not there or has no effect."""
    if named and launcher != "accelerate":
        raise LaunchError(
            f"--accelerate-config {named}: it has no effect without --launcher accelerate."
        )
    if named and not Path(named).is_file():
        raise LaunchError(
            f"--accelerate-config {named}: there is no such file. `accelerate config --config_file {named}` writes one."
        )
    return Path(named) if named else default_config()


def counts(path: Path) -> dict[str, int]:
    """Returns the machines and processes (of all machines) that a configuration file names, {} if there is no such file.

    They are plain lines at the top level of the YAML that `accelerate config` writes.
    """
    if not path.is_file():
        return {}
    found = (
        re.match(r"(\w+):\s*[\"']?(\d+)[\"']?\s*(?:#.*)?$", line)
        for line in path.read_text(encoding="utf-8").splitlines()
    )
    return {match[1]: int(match[2]) for match in found if match and match[1] in COUNTS}


def agreed(asked: int | None, *, nodes: int | None, config: Path) -> tuple[int | None, int | None]:
    """Returns (nodes, processes on each) as the flags say, or where they say nothing as accelerate's file does.

    Raises: LaunchError where the two contradict each other.
    """
    named = counts(config)
    machines, processes = named.get("num_machines"), named.get("num_processes")
    faults = []
    if nodes is not None and machines is not None and nodes != machines:
        faults.append(f"{nodes} node(s) were asked for, and {config} says num_machines: {machines}")
    nodes = machines if nodes is None else nodes
    if processes is not None and processes % (nodes or 1):
        faults.append(
            f"{config} says num_processes: {processes}, which {nodes} machines cannot share evenly"
        )
    elif processes is not None and asked is not None and asked * (nodes or 1) != processes:
        faults.append(
            f"--nproc-per-node {asked} makes {asked * (nodes or 1)} processes, and {config} says num_processes: {processes}"
        )
    if faults:
        raise LaunchError("; ".join(faults) + ". Change the flags, or that file.")
    return nodes, processes // (nodes or 1) if asked is None and processes is not None else asked
