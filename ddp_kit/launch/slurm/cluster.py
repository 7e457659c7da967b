"""SLURM's own commands, asked and answered in text: squeue, sinfo, scancel and scontrol.

Accounting (sacct) is not asked: not every site has it.
"""

import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ddp_kit.launch.environment import environment, has_slurm
from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.slurm.plan import SlurmPlan
from ddp_kit.launch.slurm.values import minutes, options

TIMEOUT_S = 60.0
# Every other state lives, those that a newer SLURM may add too: a job that is taken for dead would
# share its run directory with the next one.
ENDED = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
)
WAITING = (
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "RESV_DEL_HOLD",
    "SPECIAL_EXIT",
)
# before the run's folder, in a job's comment
MARK = "ddp_kit:"
# what SLURM says of a job that has ended some time ago
FORGOTTEN = "Invalid job id specified"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job as squeue shows it.

    `id` is JOB or JOB_TASK; `folder` is the run's, of an array the sweep's, "" if it is not ours.
    `cluster` is the name of the one that was asked: another may have a job of the same number.
    """

    id: str
    state: str
    reason: str
    folder: str
    cluster: str = ""

    @property
    def is_waiting(self) -> bool:
        """Whether it has not started, or not again."""
        return self.state in WAITING

    @property
    def is_living(self) -> bool:
        """Whether it waits, runs or may come back by itself."""
        return self.state not in ENDED


@dataclass(frozen=True, kw_only=True)
class Partition:
    """What a partition offers. `limit_min` is infinite where there is none."""

    name: str
    limit_min: float
    nodes: int
    # on its largest node
    gpus: int


def ask(*words: str) -> str:
    """Runs one of SLURM's commands, and returns its output.

    Raises: LaunchError with what it said, or if there is no SLURM here.
    """
    if not has_slurm():
        raise LaunchError(
            "there is no SLURM client here (sbatch, squeue). "
            "On this machine alone: ddp-kit run RECIPE.py"
        )
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"{words[0]} has not answered within {TIMEOUT_S:g} s: "
            "the cluster's controller may be down."
        ) from error
    if done.returncode and FORGOTTEN not in done.stderr:
        raise LaunchError(f"{words[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def jobs(*, ids: Sequence[str] = ()) -> list[Job]:
    """Returns this user's jobs that wait, run or have just ended; with `ids` only those.

    A job that SLURM has forgotten is left out. Raises: LaunchError as `ask`.
    """
    words = ["squeue", "--me", "--array", "--noheader", "--states=all", "--format=%i|%T|%r|%k"]
    if ids:
        words.append(f"--jobs={','.join(ids)}")
    text = ask(*words)
    if not text:
        return []
    here = name()
    found = []
    for line in text.splitlines():
        number, state, reason, comment = line.split("|", 3)
        folder = ""
        if comment.startswith(MARK):
            folder = comment.removeprefix(MARK)
        found.append(Job(id=number, state=state, reason=reason, folder=folder, cluster=here))
    return found


def name() -> str:
    """Returns the cluster's name, as its controller has it; "" if that does not say."""
    for line in ask("scontrol", "show", "config").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "ClusterName":
            return value.strip()
    return ""


def submitted_to(plan: SlurmPlan) -> str:
    """Returns the name of the cluster that sbatch hands a plan to.

    "" if the user's own choice sends it to another one than this.
    """
    is_elsewhere = "clusters" in options(plan.sbatch) or "SBATCH_CLUSTERS" in environment()
    if is_elsewhere:
        return ""
    return name()


def partitions() -> list[Partition]:
    """Returns the cluster's partitions, the default one first. Raises: LaunchError as `ask`."""
    rows: dict[str, Partition] = {}
    default = ""
    for line in ask("sinfo", "--all", "--noheader", "--format=%P|%l|%D|%G").splitlines():
        marked, limit, nodes, gres = line.split("|", 3)
        name = marked.rstrip("*")
        if marked.endswith("*"):
            default = name
        row = Partition(name=name, limit_min=minutes(limit), nodes=int(nodes), gpus=_gpus_in(gres))
        # a line for each kind of nodes
        earlier = rows.get(name)
        if earlier is not None:
            row = replace(row, nodes=row.nodes + earlier.nodes, gpus=max(row.gpus, earlier.gpus))
        rows[name] = row
    return sorted(rows.values(), key=lambda row: row.name != default)


def hosts(text: str) -> Iterator[str]:
    """Yields the names in a list of nodes as SLURM writes it.

    "n[1,08-10],m" is n1, n08, n09, n10 and m.
    """
    for name in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        head, bracket, rest = name.partition("[")
        if not bracket:
            yield name
            continue
        numbers, _, tail = rest.partition("]")
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", numbers):
            for number in range(int(first), int(last or first) + 1):
                yield from hosts(f"{head}{number:0{len(first)}}{tail}")


def _gpus_in(gres: str) -> int:
    """The GPUs in a list of generic resources: 6 of "gpu:a100:4,gpu:2(S:0-1),shard:8"."""
    return sum(int(number) for number in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))


def _asked_gpus(plan: SlurmPlan) -> Mapping[str, int]:
    """How many GPUs of a node a plan asks for, by the flag that does."""
    passed = options(plan.sbatch)
    gres = passed.get("gres") or ""
    asked = {}
    each = passed.get("gpus-per-node")
    if each:
        # "a100:4,2" without the "gpu:" that stands before each in a list of resources
        asked[f"--sbatch gpus-per-node={each}"] = _gpus_in(f"gpu:{each.replace(',', ',gpu:')}")
    else:
        asked[f"--gpus-per-node {plan.gpus_per_node}"] = plan.gpus_per_node
    asked[f"--sbatch gres={gres}"] = _gpus_in(gres)
    return asked


def require_fits(plan: SlurmPlan) -> None:
    """Checks a plan against the limits of its partition: SLURM would let it wait for ever.

    Raises: LaunchError with everything that the partition cannot give.
    """
    known = partitions()
    named = {partition.name: partition for partition in known}
    names = _chosen_partitions(plan, known=known)
    faults = [
        f"--partition {name}: there is none of that name; there are {', '.join(named)}"
        for name in names
        if name not in named
    ]
    chosen = [named[name] for name in names if name in named]
    if chosen:
        faults += _excesses(plan, chosen=chosen)
    if faults:
        raise LaunchError("; ".join(faults) + ".")


def _chosen_partitions(plan: SlurmPlan, *, known: Sequence[Partition]) -> list[str]:
    """The names of the partitions of which SLURM may take any for a plan."""
    asked = options(plan.sbatch).get("partition") or plan.partition
    if not asked:
        asked = environment().get("SBATCH_PARTITION", "")
    if asked:
        return asked.split(",")
    return [partition.name for partition in known[:1]]


def _excesses(plan: SlurmPlan, *, chosen: Sequence[Partition]) -> list[str]:
    """What a plan asks for and none of the chosen partitions has."""
    faults = []
    where = f"partition {', '.join(row.name for row in chosen)}"
    nodes = max(row.nodes for row in chosen)
    if plan.nodes > nodes:
        faults.append(f"--nodes {plan.nodes}: {where} has {nodes}")
    gpus = max(row.gpus for row in chosen)
    faults += [
        f"{flag}: a node of {where} has {gpus}"
        for flag, number in _asked_gpus(plan).items()
        if number > gpus
    ]
    limit_min = max(row.limit_min for row in chosen)
    flag, time = plan.limit
    if time and minutes(time) > limit_min:
        faults.append(f"{flag}: {where} allows {limit_min:g} minutes")
    return faults
