"""What is asked of SLURM, checked as a whole before anything is written or submitted.

Owns: the plan of a batch job, its faults, and its JSON form in the run directory. Refuses: rendering it and asking the cluster.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp_kit.launch.plan import LaunchError, recipe_faults

LAUNCHERS = ("srun", "torchrun", "accelerate")
PRESETS: dict[str, dict[str, str]] = {
    "nccl-debug": {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET"},
    "no-infiniband": {"NCCL_IB_DISABLE": "1"},
    "flight-recorder": {"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"},
}
TIME = re.compile(
    r"\d+(:\d{1,2}){0,2}|\d+-\d{1,2}(:\d{1,2}){0,2}|UNLIMITED|INFINITE", re.IGNORECASE
)
MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
VARIABLE = re.compile(r"[A-Za-z_]\w*=[^\n]*")
OPTION = re.compile(r"-{0,2}([a-z][a-z0-9-]*)(=.*)?", re.DOTALL)
OURS = (
    *(
        "nodes",
        "ntasks",
        "ntasks-per-node",
        "output",
        "error",
        "open-mode",
        "signal",
        "array",
        "chdir",
        "job-name",
        "comment",
    ),
    *("requeue", "no-requeue"),
)
NO_START = ("test-only", "help", "usage", "version")
NO_JOB = {
    "sbatch": (*NO_START, "parsable", "quiet", "wait", "wrap"),
    "srun": NO_START,
}  # or sbatch does not say which job it has made


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a job: where it lives, and the recipe with its flags as the ranks get them."""

    folder: str
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SlurmPlan:
    """A batch job: one run, or a sweep's, one for each element of an array. Empty texts and zeros leave a choice to the site."""

    source: str  # the recipe as the user named it, of which `runs` may name a copy
    runs: tuple[Run, ...]
    folder: str  # of submitit's files and the job's logs; shared by all nodes
    name: str
    chdir: str  # where the user stood: relative paths among the recipe's flags mean what they meant there
    snapshot: str = ""  # folder of the code's copy; "": the code runs where it lies
    code: tuple[str, ...] = ()  # the copy's folders that come first among Python's
    nodes: int = 1
    min_nodes: int = 0  # with so many it goes on after others have died, in the same job; 0: it takes all of them
    processes: int = 1  # ranks on each node
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    memory: str = ""
    time: str = ""
    partition: str = ""
    qos: str = ""
    account: str = ""
    constraint: str = ""
    exclude: str = ""
    nodelist: str = ""
    dependency: str = ""
    launcher: str = "srun"
    max_restarts: int = 0  # torchrun's, inside one life of the job; 0: as many as nodes may be lost
    warn_s: int = 120  # before the time limit
    max_requeues: int = 20
    parallel: int = 0  # elements of the array at a time; 0: all
    preset: tuple[str, ...] = ()
    env: tuple[str, ...] = ()  # NAME=VALUE
    setup: tuple[str, ...] = ()  # shell lines
    sbatch: tuple[str, ...] = ()  # K=V or K
    srun: tuple[str, ...] = ()
    container_image: str = ""
    container_mounts: str = ""
    python: str = sys.executable

    def __post_init__(self) -> None:
        recipe = self.runs[0].words[0]
        is_copied = Path(recipe).is_file() or (
            not recipe.endswith(".py") and self.snapshot != "" and Path(self.snapshot).is_dir()
        )
        faults = (
            []
            if is_copied
            else recipe_faults([self.source] if self.source else [], verb="slurm --nodes 2")
        )
        faults += _number_faults(self) + _text_faults(self) + _list_faults(self)
        if faults:
            raise LaunchError("; ".join(faults) + ".")

    @property
    def is_array(self) -> bool:
        """Whether the job is an array of several runs."""
        return len(self.runs) > 1

    @property
    def limit(self) -> tuple[str, str]:
        """The flag that limits the job's time, and the time; "" where none does. sbatch's own wins."""
        passed = options(self.sbatch).get("time")
        return (f"--sbatch time={passed}", passed) if passed else (f"--time {self.time}", self.time)

    @property
    def restarts(self) -> int:
        """What torchrun is given: the loss of a node costs the others one."""
        return self.max_restarts or (self.nodes - self.min_nodes if self.min_nodes else 0)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that presets and `--env` set; the latter win."""
        named = {name: value for preset in self.preset for name, value in PRESETS[preset].items()}
        return named | {
            name: value for name, _, value in (pair.partition("=") for pair in self.env)
        }

    def to_json(self) -> str:
        """Returns the plan as text; `from_json` gives it back."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, **changes: Any) -> "SlurmPlan":
        """Returns a plan of an earlier submission with `changes`. Raises: LaunchError if it is torn or of another version of ddp_kit."""
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise LaunchError(
                f"the plan is torn ({error}). Submit the run anew: ddp-kit slurm ... RECIPE.py --run-dir RUN"
            ) from error
        known = {field.name for field in dataclasses.fields(cls)}
        if set(found) - known:
            raise LaunchError(
                f"the plan holds {', '.join(sorted(set(found) - known))}, which this version of ddp_kit does not know."
            )
        runs = tuple(
            Run(folder=run["folder"], words=tuple(run["words"])) for run in found.pop("runs")
        )
        values = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found.items()
        }
        return cls(**{**values, "runs": runs, **changes})


def minutes(text: str) -> float:
    """Returns a SLURM time in minutes: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; infinity for words."""
    days, dash, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in (*parts, days or "0")):
        return float("inf")
    numbers = [int(part) for part in parts]
    if dash:
        hours, mins, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, mins, seconds = numbers
    else:
        hours, (mins, seconds) = 0, (*numbers, 0)[:2]
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def _number_faults(plan: SlurmPlan) -> list[str]:
    least = {
        "nodes": 1,
        "processes": 1,
        "gpus_per_node": 0,
        "cpus_per_task": 0,
        "max_restarts": 0,
        "warn_s": 1,
        "max_requeues": 0,
    }
    least |= {"min_nodes": 0, "parallel": 0}
    flags = {"processes": "nproc-per-node"}
    faults = [
        f"--{flags.get(name, name.replace('_', '-'))} {getattr(plan, name)}: expected {low} or more"
        for name, low in least.items()
        if getattr(plan, name) < low
    ]
    flag, time = plan.limit
    if time and 0 < minutes(time) * 60 <= plan.warn_s:  # 0: no limit
        faults.append(
            f"--warn-s {plan.warn_s}: expected fewer than the {minutes(time) * 60:g} seconds of {flag}"
        )
    if plan.max_restarts and plan.launcher != "torchrun":
        faults.append(
            "--max-restarts needs --launcher torchrun: srun starts each rank once, and the job is requeued"
        )
    if plan.min_nodes and plan.launcher != "torchrun":
        faults.append(
            f"--min-nodes needs --launcher torchrun: {plan.launcher} cannot go on without a node, and the job is requeued"
        )
    if plan.min_nodes and plan.min_nodes >= plan.nodes:
        faults.append(
            f"--min-nodes {plan.min_nodes}: expected fewer than --nodes {plan.nodes}, or 0 for all of them"
        )
    return faults


def _text_faults(plan: SlurmPlan) -> list[str]:
    faults = []
    if plan.launcher not in LAUNCHERS:
        faults.append(f"--launcher {plan.launcher}: expected {', '.join(LAUNCHERS)}")
    if plan.time and not TIME.fullmatch(plan.time):
        faults.append(f"--time {plan.time}: expected minutes, HH:MM:SS or D-HH:MM:SS")
    if plan.memory and not MEMORY.fullmatch(plan.memory):
        faults.append(f"--mem {plan.memory}: expected a number with K, M, G or T, for instance 64G")
    texts = (
        "name",
        "partition",
        "qos",
        "account",
        "constraint",
        "exclude",
        "nodelist",
        "dependency",
        "container_image",
        "container_mounts",
    )
    faults += [
        f"--{name.replace('_', '-')}: it holds a line break"
        for name in texts
        if "\n" in getattr(plan, name)
    ]
    for path in dict.fromkeys((plan.folder, plan.chdir, *(run.folder for run in plan.runs))):
        if set(path) & set(
            "%\\\n"
        ):  # SLURM and submitit put job ids in place of %j; SLURM drops backslashes
            faults += [
                f"{path!r}: a folder of a SLURM job must have no %, \\ or line break in its path. Type another --run-dir"
            ]
    if any(":" in path for path in plan.code):  # between Python's folders
        faults += [
            f"{plan.snapshot!r}: Python looks into no folder with a : in its path. Type another --run-dir, or --no-snapshot"
        ]
    return faults


def _list_faults(plan: SlurmPlan) -> list[str]:
    faults = [
        f"--env-preset {name}: expected {', '.join(PRESETS)}"
        for name in plan.preset
        if name not in PRESETS
    ]
    faults += [
        f"--env {pair}: expected NAME=VALUE" for pair in plan.env if not VARIABLE.fullmatch(pair)
    ]
    faults += [f"--setup {line!r}: one line a flag" for line in plan.setup if "\n" in line]
    for flag, given in {"sbatch": plan.sbatch, "srun": plan.srun}.items():
        for option in given:
            match = OPTION.fullmatch(option)
            ours = [
                name for name in OURS if match and name.startswith(match[1])
            ]  # sbatch takes their beginnings too
            if not match or "\n" in option:
                faults.append(
                    f"--{flag} {option}: expected a long option of {flag} as NAME=VALUE or NAME"
                )
            elif ours:
                faults.append(
                    f"--{flag} {option}: {ours[0]} is set by ddp_kit. `ddp-kit slurm --help` lists its flags"
                )
            elif match[1] in NO_JOB[flag]:
                faults.append(
                    f"--{flag} {option}: no job would come of it. To see the script: --dry-run"
                )
    return faults


def options(given: tuple[str, ...]) -> Mapping[str, str | None]:
    """Returns passed-through options by name; None for one without a value."""
    found = (OPTION.fullmatch(option) for option in given)
    return {match[1]: match[2][1:] if match[2] is not None else None for match in found if match}
