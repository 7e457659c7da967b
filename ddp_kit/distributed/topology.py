"""Where this process stands among the ranks, and the one place that reads the environment.

Owns: the rank facts, each with the variable it came from.
Refuses: guessing. A family of variables is complete or it is an error that lists what was found.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from ddp_kit.errors import ConfigError

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # torchrun's, DeepSpeed's launcher's
SLURM = (
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_TASKS_PER_NODE",
)

FIRST_PORT, PORTS = (
    20000,
    10000,
)  # those that are derived from a job's id: below what systems hand out by themselves


@dataclass(frozen=True, kw_only=True)
class Topology:
    """One process's place. `source` maps each fact to where it was read."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node_rank: int = 0
    nodes: int = 1
    launcher: str = "none"
    master: str = ""
    port: int = 0
    meeting: str = (
        ""  # this job's sign, where the port was derived: another job may have derived the same
    )
    source: Mapping[str, str] = field(default_factory=dict)

    @property
    def ports(self) -> list[int]:
        """Where rank 0 may listen, in the order in which all ranks try: a given port only, or some that follow from a derived one."""
        if not self.meeting:
            return [self.port]
        return [FIRST_PORT + (self.port - FIRST_PORT + 1009 * i) % PORTS for i in range(8)]

    def __post_init__(self) -> None:
        if not (
            0 <= self.rank < self.world_size
            and 0 <= self.local_rank < self.local_world_size <= self.world_size
        ):
            raise ConfigError(
                f"rank variables contradict each other: {facts(self)}. Start the ranks with torchrun or srun."
            )


def facts(topology: Topology) -> str:
    """Returns the rank facts in one line for logs and errors, each with its source."""
    names = ("rank", "local_rank", "world_size", "local_world_size", "node_rank", "nodes")
    return ", ".join(
        f"{name}={getattr(topology, name)} ({topology.source.get(name, 'default')})"
        for name in names
    )


def environment() -> Mapping[str, str]:
    """The process's environment. Everything in ddp_kit reads it through this function."""
    return os.environ


@contextmanager
def environment_default(name: str, value: str) -> Iterator[None]:
    """Sets a variable that is not set, and unsets it at the end."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


def read_topology(environ: Mapping[str, str] | None = None) -> Topology:
    """Reads the rank facts: torchrun's variables (accelerate sets the same), else SLURM step variables, else one process.

    Raises: ConfigError if a family is half set or holds no integers; it lists what was found.
    """
    environ = environment() if environ is None else environ
    if any(name in environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        return _torchrun(environ)
    if (
        "SLURM_PROCID" in environ and environ.get("SLURM_STEP_ID", "0") != "4294967290"
    ):  # an `sbatch` script's own shell is no rank
        return _slurm(environ)
    return Topology(source={"rank": "one process: neither RANK nor SLURM_PROCID is set"})


def is_first_rank(environ: Mapping[str, str] | None = None) -> bool:
    """Whether this process speaks for all of them, however incomplete its variables are."""
    environ = environment() if environ is None else environ
    return environ.get("RANK", environ.get("SLURM_PROCID", "0")) == "0"


def _complete(environ: Mapping[str, str], family: tuple[str, ...], *, start: str) -> None:
    missing = [name for name in family if name not in environ]
    if missing:
        found = ", ".join(f"{name}={environ[name]}" for name in family if name in environ)
        raise ConfigError(
            f"the rank variables are half set. Found {found}; missing {', '.join(missing)}. {start}, or unset them for one process."
        )


def _integer(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(
            f"{name}={environ[name]!r} is not an integer. Start the ranks with torchrun or srun."
        ) from None


def _torchrun(environ: Mapping[str, str]) -> Topology:
    _complete(environ, TORCHRUN, start="Start the ranks with torchrun, which sets all of them")
    world_size = _integer(environ, "WORLD_SIZE")
    source = {"rank": "RANK", "local_rank": "LOCAL_RANK", "world_size": "WORLD_SIZE"}
    local = next((name for name in LOCAL_SIZES if name in environ), "")
    local_world_size = _integer(environ, local) if local else world_size
    source["local_world_size"] = local or "WORLD_SIZE (LOCAL_WORLD_SIZE is not set: one node)"
    node_rank = (
        _integer(environ, "GROUP_RANK")
        if "GROUP_RANK" in environ
        else _integer(environ, "RANK") // max(local_world_size, 1)
    )
    source["node_rank"] = (
        "GROUP_RANK" if "GROUP_RANK" in environ else f"RANK / {local or 'WORLD_SIZE'}"
    )
    nodes = (
        _integer(environ, "GROUP_WORLD_SIZE")
        if "GROUP_WORLD_SIZE" in environ
        else -(-world_size // max(local_world_size, 1))
    )
    source["nodes"] = (
        "GROUP_WORLD_SIZE"
        if "GROUP_WORLD_SIZE" in environ
        else f"WORLD_SIZE / {local or 'WORLD_SIZE'}"
    )
    return Topology(
        rank=_integer(environ, "RANK"),
        local_rank=_integer(environ, "LOCAL_RANK"),
        world_size=world_size,
        local_world_size=local_world_size,
        node_rank=node_rank,
        nodes=nodes,
        launcher="torchrun"
        if "TORCHELASTIC_RUN_ID" in environ
        else environ.get("DDP_KIT_LAUNCHER", "environment"),
        master=environ["MASTER_ADDR"],
        port=_integer(environ, "MASTER_PORT"),
        source=source,
    )


def _slurm(environ: Mapping[str, str]) -> Topology:
    _complete(environ, SLURM, start="Start the ranks with srun, which sets all of them")
    tasks = expand_tasks(environ["SLURM_STEP_TASKS_PER_NODE"])
    node_rank = _integer(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    if node_rank >= len(tasks):
        raise ConfigError(
            f"SLURM_NODEID={node_rank} is outside SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']}."
        )
    job, restarts, step = (
        environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "RESTART_COUNT", "STEP_ID")
    )
    return Topology(
        rank=_integer(environ, "SLURM_PROCID"),
        local_rank=_integer(environ, "SLURM_LOCALID"),
        world_size=_integer(environ, "SLURM_STEP_NUM_TASKS"),
        local_world_size=tasks[node_rank],
        node_rank=node_rank,
        nodes=len(tasks),
        launcher="slurm",
        master=environ.get("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"])),
        port=_integer(environ, "MASTER_PORT")
        if "MASTER_PORT" in environ
        else _step_port(job, restarts, step),
        meeting="" if "MASTER_PORT" in environ else f"{job}.{restarts}.{step}",
        source={
            "rank": "SLURM_PROCID",
            "local_rank": "SLURM_LOCALID",
            "world_size": "SLURM_STEP_NUM_TASKS",
            "local_world_size": "SLURM_STEP_TASKS_PER_NODE",
            "node_rank": "SLURM_NODEID",
            "nodes": "SLURM_STEP_TASKS_PER_NODE",
        },
    )


def _step_port(job: str, restarts: str, step: str) -> int:
    """A port that all ranks of a step agree on and others do not take: other jobs, this job's last life, its other steps."""
    if not (job.isdigit() and restarts.isdigit() and step.isdigit()):
        return FIRST_PORT
    return FIRST_PORT + (int(job) * 7 + int(restarts) + int(step) * 613) % PORTS


def expand_tasks(text: str) -> list[int]:
    """Expands SLURM's tasks per node: "2(x2),1" is [2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        if not count.isdigit() or (times and not times.rstrip(")").isdigit()):
            raise ConfigError(
                f"SLURM_STEP_TASKS_PER_NODE={text!r} cannot be read; expected something like 2(x3),1."
            )
        counts += [int(count)] * (int(times.rstrip(")")) if times else 1)
    return counts


def first_host(nodelist: str) -> str:
    """Returns the first host of a SLURM node list: "n[3-5,9],m1" is "n3"."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return nodelist.split(",")[0]
    inside, _, tail = rest.partition("]")
    return head + inside.split(",")[0].split("-")[0] + tail.split(",")[0]
