"""What is asked of a cluster, and SLURM's configuration files as text: pure functions.

Of SLURM's many settings these make it start anywhere and answer quickly.
"""

import os
import pwd
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from cluster.tools import ClusterError

# bytes in the path of a unix socket
SOCKET_PATH = 107
# a step daemon's socket
LONGEST = "/spool/{name}/{name}_99999999.4294967290.0"
# addresses of a /24 network, one of them the controller's
MOST_NODES = 250
# 198.18.0.0/15 is set aside for test networks (RFC 2544): nobody's own
NETWORK = (198 << 24) + (18 << 16)
NETWORKS = 512
LEAST = {
    "cpus": 1,
    "gpus": 0,
    "memory_mib": 1,
    "grace_s": 0,
    "kill_wait_s": 0,
    "slurmd_timeout_s": 1,
    # SLURM takes less for its default, 120
    "requeue_delay_s": 5,
}

# Without accounting sacct only fails, and submitit then never sees that a job has died. This
# answers the one question that submitit asks, from the controller's memory, and others from the
# job completion log.
SACCT = """\
#!/bin/sh
case "$*" in
"-o JobID,State,NodeList --parsable2 "*)
    shift 3; ids=
    for word; do [ "$word" = -j ] || ids="$ids${ids:+,}$word"; done
    echo "JobID|State|NodeList"
    exec squeue --noheader --states=all --jobs="$ids" --format="%i|%T|%N" ;;
*)  PATH=${PATH#*:} exec sacct --completion "$@" ;;
esac
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A cluster as asked for. CPUs, memory and GPUs are claims: the machine need not have them.

    Raises: ClusterError with all that is wrong with it.
    """

    folder: Path
    nodes: int = 2
    cpus: int = 8
    gpus: int = 0
    memory_mib: int = 16000
    prefix: str = "n"
    grace_s: int = 5
    kill_wait_s: int = 5
    slurmd_timeout_s: int = 30
    requeue_delay_s: int = 5
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        faults = []
        if not 1 <= self.nodes <= MOST_NODES:
            faults.append(f"--nodes {self.nodes}: expected 1 to {MOST_NODES}")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                faults.append(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: expected {least} or more"
                )
        if not re.fullmatch(r"[a-z][a-z-]{0,19}", self.prefix):
            faults.append(
                f"--prefix {self.prefix!r}: "
                "expected a few lower-case letters, the start of a host name"
            )
        if re.search(r"[\s#%,=\"'\\\[\]]", str(self.folder)):
            faults.append(
                f"DIR {str(self.folder)!r}: SLURM's configuration cannot say a path with spaces "
                "or any of #%,=\"'\\[]"
            )
        if self._excess > 0:
            faults.append(
                f"DIR {self.folder} is {self._excess} characters too long "
                "for the path of a unix socket: take a shorter one, as /tmp/c"
            )
        if faults:
            raise ClusterError("; ".join(faults) + ".")

    @property
    def _excess(self) -> int:
        """By how many characters the path of the longest socket is too long."""
        if not self.names:
            return 0
        longest = len(os.fsencode(self.folder)) + len(LONGEST.format(name=self.names[-1]))
        return longest - SOCKET_PATH

    @property
    def names(self) -> list[str]:
        """The nodes' names: n0, n1, ..."""
        return [f"{self.prefix}{number}" for number in range(self.nodes)]


def user_name() -> str:
    """Returns the user that daemons and jobs run as: whoever starts the cluster."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        # containers run as numbers without a name
        return str(os.geteuid())


def host_name() -> str:
    """Returns this machine's name as SLURM shortens it."""
    return socket.gethostname().partition(".")[0]


def address(network: int | None, *, place: int) -> str:
    """Returns an address in a cluster's own network, or the loopback address if it has none."""
    if network is None:
        return "127.0.0.1"
    return socket.inet_ntoa((NETWORK + 256 * network + place).to_bytes(4, "big"))


def controller_address(network: int | None) -> str:
    """Returns where the controller listens."""
    return address(network, place=MOST_NODES + 4)


def node_addresses(plan: Plan, *, network: int | None) -> dict[str, str]:
    """Returns the nodes' addresses by name."""
    return {name: address(network, place=place) for place, name in enumerate(plan.names, start=1)}


def slurm_conf(plan: Plan, *, network: int | None, ports: list[int]) -> str:
    """Returns slurm.conf: the controller's port first, then one for each node."""
    lines = [*_paths(plan, network=network, port=ports[0]), *_behaviour(plan)]
    claims = f"CPUs={plan.cpus} RealMemory={plan.memory_mib}"
    if plan.gpus:
        claims += f" Gres=gpu:{plan.gpus}"
    addresses = node_addresses(plan, network=network)
    for (name, at), port in zip(addresses.items(), ports[1:], strict=True):
        host = host_name() if network is None else name
        lines.append(
            f"NodeName={name} NodeHostname={host} NodeAddr={at} Port={port} {claims} State=UNKNOWN"
        )
    preempted = f"State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={plan.grace_s}"
    lines += [
        f"PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE {preempted}",
        f"PartitionName=short Nodes=ALL MaxTime=60 {preempted}",
        "PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF",
    ]
    return "\n".join([*lines, *plan.extra, ""])


def _paths(plan: Plan, *, network: int | None, port: int) -> list[str]:
    folder = plan.folder
    user = user_name()
    return [
        "ClusterName=dev_cluster",
        # it compares this name with the host's, which need not resolve
        f"SlurmctldHost={host_name()}({controller_address(network)})",
        f"SlurmctldPort={port}",
        "AuthType=auth/munge",
        # cred_expire, 120 s if left alone, is also how long a requeued job waits before it may
        # start again
        f"AuthInfo=socket={folder}/munge/socket,cred_expire={plan.requeue_delay_s}",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        f"StateSaveLocation={folder}/ctld",
        f"SlurmdSpoolDir={folder}/spool/%n",
        f"SlurmctldPidFile={folder}/run/slurmctld.pid",
        f"SlurmdPidFile={folder}/run/%n.pid",
        f"SlurmctldLogFile={folder}/log/slurmctld.log",
        f"SlurmdLogFile={folder}/log/%n.log",
        "JobCompType=jobcomp/filetxt",
        f"JobCompLoc={folder}/log/jobcomp.txt",
    ]


def _behaviour(plan: Plan) -> list[str]:
    return [
        # needs no cgroups of its own
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "MpiDefault=none",
        "PropagateResourceLimits=NONE",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        # nodes may claim more than the machine has
        "SlurmdParameters=config_overrides",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,"
        "batch_sched_delay=0,sched_max_job_start=0",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "JobRequeue=1",
        "RequeueExit=85",
        "ReturnToService=2",
        # squeue still knows a job that has ended
        "MinJobAge=3600",
        f"KillWait={plan.kill_wait_s}",
        f"SlurmdTimeout={plan.slurmd_timeout_s}",
        "SlurmctldTimeout=30",
        "MessageTimeout=20",
        "TCPTimeout=2",
        "UnkillableStepTimeout=10",
        "GresTypes=gpu",
    ]


def gres_conf(plan: Plan) -> str:
    """Returns gres.conf: the fake GPUs' device files."""
    lines = ["AutoDetect=off"]
    if plan.gpus:
        last = plan.gpus - 1
        lines += [
            f"NodeName={name} Name=gpu File={plan.folder}/dev/{name}-gpu[0-{last}]"
            for name in plan.names
        ]
    return "\n".join([*lines, ""])


def hosts(plan: Plan, *, network: int | None) -> str:
    """Returns /etc/hosts as the nodes see it."""
    known = {
        "localhost": "127.0.0.1",
        **node_addresses(plan, network=network),
        host_name(): controller_address(network),
    }
    lines = ["::1 localhost"]
    for name, at in known.items():
        # torch's store asks for the name of the mapped form
        lines += [f"{at} {name}", f"::ffff:{at} {name}"]
    return "\n".join([*lines, ""])
