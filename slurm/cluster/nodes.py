"""One node: started, killed, frozen, thawed, and what runs on it.

SLURM is not told. It has to notice by itself, as it would a real fault.
"""

import os
import signal

from cluster.network import entry, holder_of
from cluster.processes import (
    command_of,
    everyone,
    has_open,
    has_variables,
    is_stopped,
    network_of,
    program_of,
    settle,
    start_time,
    with_descendants,
)
from cluster.state import State
from cluster.tools import tool

CLIENTS = ("salloc", "sattach", "sbatch", "srun")


def daemon_of(node: str) -> str:
    """Returns the name under which a node's slurmd is known."""
    return f"slurmd-{node}"


def start(state: State, node: str) -> None:
    """Starts a node's slurmd; one that is running stays."""
    if state.is_alive(daemon_of(node)):
        return
    (state.folder / "spool" / node).mkdir(exist_ok=True)
    state.start(
        daemon_of(node),
        [*entry(state, node), tool("slurmd"), "-D", "-N", node, "-f", str(state.config)],
    )


def kill(state: State, node: str) -> None:
    """Ends all that runs on a node with SIGKILL, its daemons first: so nobody can report it."""
    settle(lambda: daemons_on(state, node), signal.SIGKILL, is_done=_is_gone)
    settle(lambda: running_on(state, node), signal.SIGKILL, is_done=_is_gone)


def _is_gone(pid: int) -> bool:
    return start_time(pid) is None


def freeze(state: State, node: str) -> None:
    """Stops all that runs on a node: it does not answer, and does not end either."""
    settle(lambda: running_on(state, node), signal.SIGSTOP, is_done=is_stopped)


def thaw(state: State, node: str) -> None:
    """Undoes `freeze`."""
    settle(
        lambda: running_on(state, node),
        signal.SIGCONT,
        is_done=lambda pid: not is_stopped(pid) or _is_gone(pid),
    )


def daemons_on(state: State, node: str) -> set[int]:
    """Returns the ids of a node's slurmd and step daemons."""
    steps = {pid for pid in running_on(state, node) if _is_step_daemon(pid)}
    return steps | _living(state, daemon_of(node))


def _living(state: State, name: str) -> set[int]:
    """The id of a process of ours, if it is alive."""
    if not state.is_alive(name):
        return set()
    return {state.pids[name][0]}


def _is_step_daemon(pid: int) -> bool:
    return command_of(pid).startswith("slurmstepd:")


def jobs_on(state: State, node: str) -> set[int]:
    """Returns the ids of all that runs on a node beside its slurmd: jobs, and what they left."""
    return running_on(state, node) - _living(state, daemon_of(node))


def clients_of(state: State) -> list[tuple[int, int]]:
    """Returns (id, start time) of the commands that wait for this cluster's jobs elsewhere."""
    mark = [f"SLURM_CONF={state.config}"]
    found = []
    for pid in everyone():
        if program_of(pid) in CLIENTS and has_variables(pid, mark):
            started = start_time(pid)
            if started is not None:
                found.append((pid, started))
    return found


def running_on(state: State, node: str) -> set[int]:
    """Returns the ids of all processes on a node but its holder."""
    holder = _living(state, holder_of(node))
    if state.network is None:
        found = with_descendants(_roots(state, node))
    else:
        networks = {network_of(pid) for pid in holder} - {None}
        found = {pid for pid in everyone() if network_of(pid) in networks}
    return found - holder - {os.getpid()}


def _roots(state: State, node: str) -> set[int]:
    """The daemons of a node without a network of its own, and what knows that it runs there."""
    roots = _living(state, daemon_of(node))
    log = state.folder / "log" / f"{node}.log"
    mark = (f"SLURM_CONF={state.config}", f"SLURMD_NODENAME={node}")
    for pid in everyone():
        if _is_step_daemon(pid):
            is_on_node = has_open(pid, log)
        else:
            is_on_node = has_variables(pid, mark)
        if is_on_node:
            roots.add(pid)
    return roots
