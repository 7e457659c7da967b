"""One node's life: started, killed, frozen, thawed, and what runs on it.

Owns: which processes are a node's. Refuses: telling SLURM. It has to notice by itself, as it would a real fault.
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
    """Ends all that runs on a node with SIGKILL, its daemons first, so that nobody can report it."""
    settle(
        lambda: daemons_on(state, node), signal.SIGKILL, is_done=lambda pid: start_time(pid) is None
    )
    settle(
        lambda: running_on(state, node), signal.SIGKILL, is_done=lambda pid: start_time(pid) is None
    )


def freeze(state: State, node: str) -> None:
    """Stops all that runs on a node: it does not answer, and does not end either."""
    settle(lambda: running_on(state, node), signal.SIGSTOP, is_done=is_stopped)


def thaw(state: State, node: str) -> None:
    """Undoes `freeze`."""
    settle(
        lambda: running_on(state, node),
        signal.SIGCONT,
        is_done=lambda pid: not is_stopped(pid) or start_time(pid) is None,
    )


def daemons_on(state: State, node: str) -> set[int]:
    """Returns the ids of a node's slurmd and step daemons."""
    own = {state.pids[daemon_of(node)][0]} if state.is_alive(daemon_of(node)) else set()
    return own | {
        pid for pid in running_on(state, node) if command_of(pid).startswith("slurmstepd:")
    }


def jobs_on(state: State, node: str) -> set[int]:
    """Returns the ids of all that runs on a node beside its slurmd: jobs, and what they have left behind."""
    return running_on(state, node) - (
        {state.pids[daemon_of(node)][0]} if state.is_alive(daemon_of(node)) else set()
    )


def clients_of(state: State) -> list[tuple[int, int]]:
    """Returns (id, start time) of the commands that wait for this cluster's jobs outside its nodes."""
    found = [
        pid
        for pid in everyone()
        if program_of(pid) in CLIENTS and has_variables(pid, [f"SLURM_CONF={state.config}"])
    ]
    return [(pid, started) for pid in found if (started := start_time(pid)) is not None]


def running_on(state: State, node: str) -> set[int]:
    """Returns the ids of all processes on a node but its holder."""
    apart = {os.getpid()} | (
        {state.pids[holder_of(node)][0]} if state.is_alive(holder_of(node)) else set()
    )
    if state.network is not None:
        network = (
            network_of(state.pids[holder_of(node)][0]) if state.is_alive(holder_of(node)) else None
        )
        return (
            set()
            if network is None
            else {pid for pid in everyone() if network_of(pid) == network} - apart
        )
    roots = {state.pids[daemon_of(node)][0]} if state.is_alive(daemon_of(node)) else set()
    log = state.folder / "log" / f"{node}.log"
    mark = (f"SLURM_CONF={state.config}", f"SLURMD_NODENAME={node}")
    for pid in everyone():
        if (
            has_open(pid, log)
            if command_of(pid).startswith("slurmstepd:")
            else has_variables(pid, mark)
        ):
            roots.add(pid)
    return with_descendants(roots) - apart
