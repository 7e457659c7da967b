"""What is asked of SLURM, checked as a whole before anything is written or submitted.

A plan also has a form as JSON, in which it stays in the run directory.
"""

import dataclasses
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp_kit.launch.plan import LaunchError, recipe_faults
from ddp_kit.launch.slurm.values import MEMORY, TIME, minutes, option_faults, options

LAUNCHERS = ("srun", "torchrun", "accelerate")
PRESETS: dict[str, dict[str, str]] = {
    "nccl-debug": {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET"},
    "no-infiniband": {"NCCL_IB_DISABLE": "1"},
    "flight-recorder": {"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"},
}
VARIABLE = re.compile(r"[A-Za-z_]\w*=[^\n]*")
# the least value of each field that is a number
LEAST = {
    "nodes": 1,
    "processes": 1,
    "gpus_per_node": 0,
    "cpus_per_task": 0,
    "max_restarts": 0,
    "warn_s": 1,
    "max_requeues": 0,
    "min_nodes": 0,
    "parallel": 0,
}
# fields that stand in one line of the script
ONE_LINE = (
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


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a job: where it lives, and the recipe with its flags as the ranks get them."""

    folder: str
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class SlurmPlan:
    """A batch job: one run, or a sweep's, one for each element of an array.

    Empty texts and zeros leave a choice to the site. Raises: LaunchError with all faults.
    """

    # the recipe as the user named it, of which `runs` may name a copy
    source: str
    runs: tuple[Run, ...]
    # of submitit's files and the job's logs; shared by all nodes
    folder: str
    name: str
    # where the user stood: relative paths among the recipe's flags mean what they meant there
    chdir: str
    # folder of the code's copy; "": the code runs where it lies
    snapshot: str = ""
    # the copy's folders that come first among Python's
    code: tuple[str, ...] = ()
    nodes: int = 1
    # with so many it goes on after others have died, in the same job; 0: it takes all of them
    min_nodes: int = 0
    # ranks on each node
    processes: int = 1
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
    # torchrun's, inside one life of the job; 0: as many as nodes may be lost
    max_restarts: int = 0
    # before the time limit
    warn_s: int = 120
    max_requeues: int = 20
    # elements of the array at a time; 0: all
    parallel: int = 0
    preset: tuple[str, ...] = ()
    # NAME=VALUE
    env: tuple[str, ...] = ()
    # shell lines
    setup: tuple[str, ...] = ()
    # K=V or K
    sbatch: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    container_image: str = ""
    container_mounts: str = ""
    python: str = sys.executable

    def __post_init__(self) -> None:
        faults = []
        if not _is_copied(self):
            words = [self.source] if self.source else []
            faults = recipe_faults(words, verb="slurm --nodes 2")
        faults += _number_faults(self) + _text_faults(self) + _list_faults(self)
        if faults:
            raise LaunchError("; ".join(faults) + ".")

    @property
    def is_array(self) -> bool:
        """Whether the job is an array of several runs."""
        return len(self.runs) > 1

    @property
    def has_agents(self) -> bool:
        """Whether a task is a node's agent, which starts the ranks, and not a rank itself."""
        return self.launcher != "srun"

    @property
    def tasks_per_node(self) -> int:
        """How many tasks SLURM starts on a node: the ranks, or their one agent."""
        if self.has_agents:
            return 1
        return self.processes

    @property
    def limit(self) -> tuple[str, str]:
        """The flag that limits the job's time, and the time; "" where none does.

        sbatch's own wins.
        """
        passed = options(self.sbatch).get("time")
        if passed:
            return f"--sbatch time={passed}", passed
        return f"--time {self.time}", self.time

    @property
    def restarts(self) -> int:
        """What torchrun is given: the loss of a node costs the others one."""
        if self.max_restarts or not self.min_nodes:
            return self.max_restarts
        return self.nodes - self.min_nodes

    @property
    def environment(self) -> dict[str, str]:
        """The variables that presets and `--env` set; the latter win."""
        stated: dict[str, str] = {}
        for preset in self.preset:
            stated |= PRESETS[preset]
        for pair in self.env:
            name, _, value = pair.partition("=")
            stated[name] = value
        return stated

    def to_json(self) -> str:
        """Returns the plan as text; `from_json` gives it back."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, **changes: Any) -> "SlurmPlan":
        """Returns a plan of an earlier submission with `changes`.

        Raises: LaunchError if it is torn, of another version of ddp_kit, or has faults.
        """
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise LaunchError(
                f"the plan is torn ({error}). "
                "Submit the run anew: ddp-kit slurm ... RECIPE.py --run-dir RUN"
            ) from error
        unknown = set(found) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise LaunchError(
                f"the plan holds {', '.join(sorted(unknown))}, "
                "which this version of ddp_kit does not know."
            )
        values = {}
        for name, value in found.items():
            values[name] = tuple(value) if isinstance(value, list) else value
        values["runs"] = tuple(
            Run(folder=run["folder"], words=tuple(run["words"])) for run in found["runs"]
        )
        return cls(**{**values, **changes})


def _is_copied(plan: SlurmPlan) -> bool:
    """Whether the recipe is there to run, so that its source need not be there any more."""
    recipe = plan.runs[0].words[0]
    if Path(recipe).is_file():
        return True
    return not recipe.endswith(".py") and plan.snapshot != "" and Path(plan.snapshot).is_dir()


def _number_faults(plan: SlurmPlan) -> list[str]:
    faults = []
    for name, least in LEAST.items():
        if getattr(plan, name) < least:
            flag = "nproc-per-node" if name == "processes" else name.replace("_", "-")
            faults.append(f"--{flag} {getattr(plan, name)}: expected {least} or more")
    flag, time = plan.limit
    # 0: no limit
    if time and 0 < minutes(time) * 60 <= plan.warn_s:
        faults.append(
            f"--warn-s {plan.warn_s}: "
            f"expected fewer than the {minutes(time) * 60:g} seconds of {flag}"
        )
    if plan.max_restarts and plan.launcher != "torchrun":
        faults.append(
            "--max-restarts needs --launcher torchrun: "
            "srun starts each rank once, and the job is requeued"
        )
    if plan.min_nodes and plan.launcher != "torchrun":
        faults.append(
            f"--min-nodes needs --launcher torchrun: {plan.launcher} cannot go on without a node, "
            "and the job is requeued"
        )
    if plan.min_nodes and plan.min_nodes >= plan.nodes:
        faults.append(
            f"--min-nodes {plan.min_nodes}: "
            f"expected fewer than --nodes {plan.nodes}, or 0 for all of them"
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
    faults += [
        f"--{name.replace('_', '-')}: it holds a line break"
        for name in ONE_LINE
        if "\n" in getattr(plan, name)
    ]
    folders = dict.fromkeys((plan.folder, plan.chdir, *(run.folder for run in plan.runs)))
    # SLURM and submitit put job ids in place of %j; SLURM drops backslashes
    faults += [
        f"{path!r}: a folder of a SLURM job must have no %, \\ or line break in its path. "
        "Type another --run-dir"
        for path in folders
        if set(path) & set("%\\\n")
    ]
    # it stands between Python's folders
    if any(":" in path for path in plan.code):
        faults.append(
            f"{plan.snapshot!r}: Python looks into no folder with a : in its path. "
            "Type another --run-dir, or --no-snapshot"
        )
    return faults


def _list_faults(plan: SlurmPlan) -> list[str]:
    known = ", ".join(PRESETS)
    faults = [
        f"--env-preset {name}: expected {known}" for name in plan.preset if name not in PRESETS
    ]
    faults += [
        f"--env {pair}: expected NAME=VALUE" for pair in plan.env if not VARIABLE.fullmatch(pair)
    ]
    faults += [f"--setup {line!r}: one line a flag" for line in plan.setup if "\n" in line]
    faults += option_faults("sbatch", plan.sbatch)
    faults += option_faults("srun", plan.srun)
    return faults
