"""A cluster's start and end, each in its order; a start that fails leaves nothing but logs."""

import contextlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cluster import config, network, nodes
from cluster.config import Plan
from cluster.processes import end
from cluster.state import State, prepare, read_state
from cluster.tools import ClusterError, output_of, tool, wait_until

START_S = 30.0
# a controller asked to stop waits for nodes that will not answer
STOP_S = 1.0
# lines of each log that a failed start shows
TAIL = 5


def up(plan: Plan, *, has_network: bool) -> State:
    """Starts a cluster and waits until each node is idle.

    Raises: ClusterError if it does not come up, after taking everything down again.
    """
    folder = plan.folder
    state = State(folder=folder, addresses={})
    try:
        if has_network:
            state.network = network.make_bridge()
        state.addresses = config.node_addresses(plan, network=state.network)
        state.port, *ports = _free_ports(1 + plan.nodes)
        state.save()
        _write(plan, state=state, ports=ports)
        _start(state)
    except BaseException as error:
        # also Ctrl-C: nothing is left running
        tails = _tails(folder)
        down(state)
        if isinstance(error, ClusterError):
            raise ClusterError(
                f"{error} The cluster is down again; "
                f"its logs are in {folder / 'log'}.\n{tails}".rstrip()
            ) from None
        raise
    return state


def down(state: State) -> None:
    """Ends everything that was started from the folder, frozen or not, and removes its network.

    Logs stay. Raises: ClusterError for what would not end. The folder still knows of it, so that
    another `down` tries again.
    """
    if state.is_alive("slurmctld"):
        # whoever waits for a job outside (srun) learns that it is over
        with contextlib.suppress(subprocess.TimeoutExpired):
            words = [tool("scancel"), "--full", f"--user={config.user_name()}"]
            subprocess.run(words, env=state.environ, capture_output=True, timeout=5 * STOP_S)
    faults = []
    for node in state.addresses:
        try:
            nodes.kill(state, node)
        except ClusterError as error:
            faults.append(f"{node}: {error}")
    daemons = ["slurmctld", "munged", *(network.holder_of(node) for node in state.addresses)]
    # they would wait for steps that cannot answer any more
    for pid, started in nodes.clients_of(state):
        end(pid, started=started, within_s=0)
    for pid, started in [state.pids[name] for name in daemons if name in state.pids]:
        end(pid, started=started, within_s=STOP_S)
    if state.network is not None:
        network.remove_bridge(state.network)
    if faults:
        raise ClusterError(" ".join(faults))
    state.forget()


def claim(folder: Path) -> None:
    """Makes the folder ready for a new cluster.

    Raises: ClusterError if one is up there, or it is somebody else's folder.
    """
    old = read_state(folder)
    if old is not None and any(old.is_alive(name) for name in old.pids):
        raise ClusterError(
            f"{folder}: a cluster is up here. "
            f"Use it, or end it first: slurm/dev_cluster down {folder}"
        )
    if old is not None:
        # the machine went down under it
        down(old)
    prepare(folder)


def _write(plan: Plan, *, state: State, ports: list[int]) -> None:
    etc = plan.folder / "etc"
    state.config.write_text(
        config.slurm_conf(plan, network=state.network, ports=[state.port, *ports])
    )
    # in some containers; looking there for the version would end slurmd
    if not Path("/sys/fs/cgroup").is_mount():
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (etc / "gres.conf").write_text(config.gres_conf(plan))
    (etc / "hosts").write_text(config.hosts(plan, network=state.network))
    (etc / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    # SLURM takes nothing but a device for a GPU, but any device
    for name in plan.names:
        for number in range(plan.gpus):
            (plan.folder / "dev" / f"{name}-gpu{number}").symlink_to("/dev/null")
    sacct = plan.folder / "bin" / "sacct"
    sacct.write_text(config.SACCT)
    sacct.chmod(0o755)


def _start(state: State) -> None:
    folder = state.folder / "munge"
    folder.chmod(0o711)
    key = folder / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    files = [f"--{name}-file={folder / name}" for name in ("key", "pid", "seed", "log")]
    flags = ["--foreground", "--force", "--num-threads=2", f"--socket={folder / 'socket'}"]
    state.start("munged", [tool("munged"), *flags, *files])
    _wait(state, "munged", is_up=(folder / "socket").exists)
    if state.network is not None:
        network.connect_bridge(state.network)
        for node in state.addresses:
            network.hold(state, node)
    state.start("slurmctld", [tool("slurmctld"), "-D", "-f", str(state.config)])
    # a slurmd that finds no controller tries again after 10 s
    _wait(state, "slurmctld", is_up=lambda: _listens(state))
    for node in state.addresses:
        nodes.start(state, node)
    wait_until(lambda: _is_ready(state), within_s=START_S, what="all nodes to be idle")


def _listens(state: State) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((config.controller_address(state.network), state.port)) == 0


def _wait(state: State, name: str, *, is_up: Callable[[], bool]) -> None:
    """Waits for a daemon. Raises: ClusterError if it ends, or is not up in time."""
    wait_until(lambda: is_up() or not state.is_alive(name), within_s=START_S, what=name)
    if not state.is_alive(name):
        raise ClusterError(f"{name} ended at the start.")


def _is_ready(state: State) -> bool:
    for name in ("munged", "slurmctld", *map(nodes.daemon_of, state.addresses)):
        if not state.is_alive(name):
            raise ClusterError(f"{name} ended at the start.")
    words = [tool("sinfo"), "--noheader", "--Node", "--partition=low", "--format=%t"]
    try:
        found = output_of(words, environ=state.environ).split()
    except ClusterError:
        # the controller does not answer yet
        return False
    return found == ["idle"] * len(state.addresses)


def _free_ports(number: int) -> list[int]:
    """Returns ports that nobody listens on.

    They are below those that the kernel hands out for outgoing connections. Raises: ClusterError
    if there are too few.
    """
    try:
        top = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        top = 32768
    candidates = list(range(10000, max(top, 20000)))
    random.shuffle(candidates)
    found: list[int] = []
    for port in candidates:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == number:
            return found
    raise ClusterError(f"no {number} free ports between 10000 and {max(top, 20000)}.")


def _tails(folder: Path) -> str:
    parts = []
    for path in sorted((folder / "log").iterdir()):
        lines = path.read_text(errors="replace").splitlines()[-TAIL:]
        if lines:
            parts += [f"== {path.name}", *lines]
    return "\n".join(parts)


def say(text: str) -> None:
    """Prints for people: stdout belongs to what the shell evaluates."""
    print(text, file=sys.stderr)
