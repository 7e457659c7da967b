"""Where this process stands among the ranks, and the one place where it reads the environment.

Each fact has the variable it came from. Nothing is guessed: a family of variables is complete, or
it is an error that lists what was found.
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

INTERACTIVE_STEP = "4294967290"  # SLURM_STEP_ID of an `sbatch` script's own shell, no rank
# Those that are derived from a job's id: below what systems hand out by themselves.
FIRST_PORT = 20000
PORTS = 10000


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
    rendezvous_host: str = ""
    port: int = 0
    # This job's sign, where the port was derived: another job may have derived the same.
    meeting: str = ""
    source: Mapping[str, str] = field(default_factory=dict)

    @property
    def ports(self) -> list[int]:
        """Where rank 0 may listen, in the order in which all ranks try.

        A given port only, or some that follow from a derived one.
        """
        if not self.meeting:
            return [self.port]
        return [FIRST_PORT + (self.port - FIRST_PORT + 1009 * i) % PORTS for i in range(8)]

    def __post_init__(self) -> None:
        is_rank = 0 <= self.rank < self.world_size
        is_local = 0 <= self.local_rank < self.local_world_size <= self.world_size
        if not (is_rank and is_local):
            raise ConfigError(
                f"rank variables contradict each other: {facts(self)}."
                " Start the ranks with torchrun or srun."
            )


def facts(topology: Topology) -> str:
    """Returns the rank facts in one line for logs and errors, each with its source."""
    found = []
    for name in ("rank", "local_rank", "world_size", "local_world_size", "node_rank", "nodes"):
        source = topology.source.get(name, "default")
        found.append(f"{name}={getattr(topology, name)} ({source})")
    return ", ".join(found)


def environment() -> Mapping[str, str]:
    """Returns the process's environment. All that a rank reads of it comes from here."""
    return os.environ


@contextmanager
def environment_default(name: str, value: str) -> Iterator[None]:
    """Sets a variable that is not set while it lasts, and unsets it at the end."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


def read_topology(environ: Mapping[str, str] | None = None) -> Topology:
    """Reads the rank facts.

    They are torchrun's variables (accelerate sets the same), else SLURM step variables, else this
    is one process.

    Args: `environ` the process's own if not given.
    Raises: ConfigError if a family is half set or holds no integers; it lists what was found.
    """
    if environ is None:
        environ = environment()
    if any(name in environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
        return _torchrun(environ)
    if "SLURM_PROCID" in environ and environ.get("SLURM_STEP_ID") != INTERACTIVE_STEP:
        return _slurm(environ)
    return Topology(source={"rank": "one process: neither RANK nor SLURM_PROCID is set"})


def is_first_rank(environ: Mapping[str, str] | None = None) -> bool:
    """Whether this process speaks for all of them, however incomplete its variables are."""
    if environ is None:
        environ = environment()
    return environ.get("RANK", environ.get("SLURM_PROCID", "0")) == "0"


def _complete(environ: Mapping[str, str], family: tuple[str, ...], *, start: str) -> None:
    missing = [name for name in family if name not in environ]
    if missing:
        found = ", ".join(f"{name}={environ[name]}" for name in family if name in environ)
        raise ConfigError(
            f"the rank variables are half set. Found {found}; missing {', '.join(missing)}."
            f" {start}, or unset them for one process."
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
    # Without a local size all ranks are on one node.
    local = next((name for name in LOCAL_SIZES if name in environ), "WORLD_SIZE")
    local_world_size = _integer(environ, local)
    source["local_world_size"] = local
    if local == "WORLD_SIZE":
        source["local_world_size"] = "WORLD_SIZE (LOCAL_WORLD_SIZE is not set: one node)"
    rank = _integer(environ, "RANK")
    node_rank = rank // max(local_world_size, 1)
    source["node_rank"] = f"RANK / {local}"
    if "GROUP_RANK" in environ:
        node_rank = _integer(environ, "GROUP_RANK")
        source["node_rank"] = "GROUP_RANK"
    nodes = -(-world_size // max(local_world_size, 1))  # rounded up
    source["nodes"] = f"WORLD_SIZE / {local}"
    if "GROUP_WORLD_SIZE" in environ:
        nodes = _integer(environ, "GROUP_WORLD_SIZE")
        source["nodes"] = "GROUP_WORLD_SIZE"
    launcher = environ.get("DDP_KIT_LAUNCHER", "environment")
    if "TORCHELASTIC_RUN_ID" in environ:
        launcher = "torchrun"
    return Topology(
        rank=rank,
        local_rank=_integer(environ, "LOCAL_RANK"),
        world_size=world_size,
        local_world_size=local_world_size,
        node_rank=node_rank,
        nodes=nodes,
        launcher=launcher,
        rendezvous_host=environ["MASTER_ADDR"],
        port=_integer(environ, "MASTER_PORT"),
        source=source,
    )


def _slurm(environ: Mapping[str, str]) -> Topology:
    _complete(environ, SLURM, start="Start the ranks with srun, which sets all of them")
    tasks = expand_tasks(environ["SLURM_STEP_TASKS_PER_NODE"])
    node_rank = _integer(environ, "SLURM_NODEID") if "SLURM_NODEID" in environ else 0
    if node_rank >= len(tasks):
        raise ConfigError(
            f"SLURM_NODEID={node_rank} is outside"
            f" SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']}."
        )
    job = environ.get("SLURM_JOB_ID", "0")
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    step = environ.get("SLURM_STEP_ID", "0")
    if "MASTER_PORT" in environ:
        port = _integer(environ, "MASTER_PORT")
        sign = ""
    else:
        port = _step_port(job, restarts, step)
        sign = f"{job}.{restarts}.{step}"
    return Topology(
        rank=_integer(environ, "SLURM_PROCID"),
        local_rank=_integer(environ, "SLURM_LOCALID"),
        world_size=_integer(environ, "SLURM_STEP_NUM_TASKS"),
        local_world_size=tasks[node_rank],
        node_rank=node_rank,
        nodes=len(tasks),
        launcher="slurm",
        rendezvous_host=environ.get("MASTER_ADDR", first_host(environ["SLURM_STEP_NODELIST"])),
        port=port,
        meeting=sign,
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
    """Returns a port that all ranks of a step agree on and others do not take.

    Others are other jobs, this job's last attempt, its other steps.
    """
    if not (job.isdigit() and restarts.isdigit() and step.isdigit()):
        return FIRST_PORT
    return FIRST_PORT + (int(job) * 7 + int(restarts) + int(step) * 613) % PORTS


def expand_tasks(text: str) -> list[int]:
    """Expands SLURM's tasks per node: "2(x2),1" is [2, 2, 1].

    Raises: ConfigError for a text of another form.
    """
    counts: list[int] = []
    for part in text.split(","):
        count, _, rest = part.partition("(x")
        times = rest.rstrip(")") if rest else "1"
        if not count.isdigit() or not times.isdigit():
            raise ConfigError(
                f"SLURM_STEP_TASKS_PER_NODE={text!r} cannot be read;"
                " expected something like 2(x3),1."
            )
        counts += [int(count)] * int(times)
    return counts


def first_host(nodelist: str) -> str:
    """Returns the first host of a SLURM node list: "n[3-5,9],m1" is "n3"."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return nodelist.split(",")[0]
    inside, _, tail = rest.partition("]")
    return head + inside.split(",")[0].split("-")[0] + tail.split(",")[0]
