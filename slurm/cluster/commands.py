"""The command line of `slurm/dev_cluster`: its flags, and what is said to people."""

import argparse
import os
import select
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from cluster import lifecycle, network, nodes
from cluster.config import Plan
from cluster.lifecycle import say
from cluster.processes import command_of
from cluster.state import State, locked, read_state
from cluster.tools import ClusterError, check_installed, wait_until

HELP = """\
A throw-away SLURM cluster of several nodes on this machine, in one folder, for tests and for trying things out.

    slurm/dev_cluster up DIR --nodes 2 --gpus 8     start it
    eval "$(slurm/dev_cluster env DIR)"             sbatch, srun, squeue, ... of this shell talk to it now
    slurm/dev_cluster down DIR                      end it; its logs stay in DIR/log

    slurm/dev_cluster kill-node DIR n1              SIGKILL to all that runs on the node; start-node brings it back
    slurm/dev_cluster freeze DIR n1                 the node hangs; thaw undoes it
    slurm/dev_cluster cut DIR n1 [n2]               unplugs the node, or loses what it sends to and gets from n2; join undoes it
    slurm/dev_cluster exec DIR n1 -- COMMAND        runs a command with the node's network and host name
    slurm/dev_cluster ps DIR                        what runs on the nodes beside SLURM's daemon: node, process id, command
    slurm/dev_cluster check                         is everything installed?

Any user may do that. Root's nodes have host names and addresses of their own, in network namespaces. Partitions: low (default; jobs are
preempted and requeued), short (the same, one hour at most) and high (preempts). Exit code 85 of a batch script requeues it.
"""  # noqa: E501  (people read it as it is)
# flags of `up` that are fields of a plan
NUMBERS = {
    "nodes": "how many",
    "cpus": "CPUs that each node claims; the machine need not have them",
    "gpus": "fake GPUs of each node: device numbers to hand out",
    "memory_mib": "memory that each node claims",
    "grace_s": "seconds between SIGTERM and SIGKILL of a preempted job",
    "kill_wait_s": "seconds between SIGTERM and SIGKILL of a job that is cancelled or out of time",
    "slurmd_timeout_s": "seconds of silence after which a node counts as down; "
    "small values trip on a loaded machine",
    "requeue_delay_s": "seconds that a requeued job waits before it may start again",
}


def parser() -> argparse.ArgumentParser:
    """Returns the reader of the command line."""
    made = argparse.ArgumentParser(
        "dev_cluster",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = made.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_up_flags(
        verbs.add_parser(
            "up",
            help="start a cluster",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )
    )
    for verb in ("env", "ps", "down"):
        verbs.add_parser(verb).add_argument("folder", metavar="DIR", type=_folder)
    verbs.choices["down"].add_argument(
        "--after", type=int, metavar="PID", help="wait until this process has ended"
    )
    for verb in ("kill-node", "start-node", "freeze", "thaw", "cut", "join", "exec"):
        made_verb = verbs.add_parser(verb)
        made_verb.add_argument("folder", metavar="DIR", type=_folder)
        made_verb.add_argument("node", metavar="NODE")
        if verb in ("cut", "join"):
            made_verb.add_argument("peer", metavar="PEER", nargs="?")
        if verb == "exec":
            made_verb.add_argument("words", metavar="-- COMMAND", nargs=argparse.REMAINDER)
    verbs.add_parser("check")
    return made


def _add_up_flags(start: argparse.ArgumentParser) -> None:
    start.add_argument("folder", metavar="DIR", type=_folder)
    for name, text in NUMBERS.items():
        start.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=getattr(Plan, name),
            metavar="N",
            help=text,
        )
    start.add_argument("--prefix", default=Plan.prefix, help="of the nodes' names")
    start.add_argument(
        "--conf",
        dest="extra",
        action="append",
        default=[],
        metavar="LINE",
        help="one more line for slurm.conf",
    )
    start.add_argument(
        "--netns",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="namespaces with host names and addresses; default: if allowed",
    )


def _folder(text: str) -> Path:
    return Path(text).resolve()


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns: 0, 1 if the cluster cannot do it, 2 for usage."""
    try:
        asked = parser().parse_args(sys.argv[1:] if argv is None else argv)
    except SystemExit as end:
        # argparse has said what is wrong
        return int(end.code or 0)
    try:
        VERBS.get(asked.verb, _on_node)(asked)
    except ClusterError as error:
        say(f"dev_cluster: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _up(asked: argparse.Namespace) -> None:
    numbers = {name: getattr(asked, name) for name in NUMBERS}
    plan = Plan(folder=asked.folder, prefix=asked.prefix, extra=tuple(asked.extra), **numbers)
    check_installed()
    obstacle = ""
    if asked.netns is not False:
        obstacle = network.why_not()
    if obstacle and asked.netns:
        raise ClusterError(
            f"--netns: this user may not make network namespaces here ({obstacle}). "
            "Be root, or leave it out."
        )
    begin = time.monotonic()
    lifecycle.claim(plan.folder)
    with locked(plan.folder):
        lifecycle.up(plan, has_network=asked.netns is not False and not obstacle)
    if obstacle:
        same = f"all nodes share this machine's name and address; {plan.names[0]} does not resolve"
        say(f"no network namespaces here ({obstacle}): {same}.")
    took_s = time.monotonic() - begin
    say(
        f"{' '.join(plan.names)} up in {took_s:.1f} s. "
        f'Next: eval "$(slurm/dev_cluster env {plan.folder})"'
    )


def _env(asked: argparse.Namespace) -> None:
    state = _state(asked.folder)
    print(f"export SLURM_CONF={shlex.quote(str(state.config))}")
    print(f'export PATH={shlex.quote(str(state.folder / "bin"))}:"$PATH"')


def _ps(asked: argparse.Namespace) -> None:
    state = _state(asked.folder)
    for node in state.addresses:
        for pid in sorted(nodes.jobs_on(state, node)):
            print(node, pid, command_of(pid))


def _down(asked: argparse.Namespace) -> None:
    if asked.after is not None:
        _wait_for_end(asked.after)
    if read_state(asked.folder) is None:
        say(f"{asked.folder}: no cluster here, nothing to do.")
        return
    with locked(asked.folder):
        state = read_state(asked.folder)
        if state is not None:
            lifecycle.down(state)


def _wait_for_end(pid: int) -> None:
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([process], [], [])
    os.close(process)


def _check(asked: argparse.Namespace) -> None:
    check_installed()


def _on_node(asked: argparse.Namespace) -> None:
    state = _state(asked.folder)
    _require_node(state, asked.node)
    if asked.verb == "exec":
        _become(state, asked)
    with locked(asked.folder):
        # as the command before has left it
        state = _state(asked.folder)
        if asked.verb in CABLES:
            if asked.peer is not None:
                _require_node(state, asked.peer)
            CABLES[asked.verb](state, asked.node, peer=asked.peer)
        else:
            FAULTS[asked.verb](state, asked.node)


def _become(state: State, asked: argparse.Namespace) -> NoReturn:
    """Replaces this process by the command that is to run on the node."""
    words = asked.words
    if words[:1] == ["--"]:
        words = words[1:]
    if not words:
        raise ClusterError(
            "exec: the command is missing: "
            f"slurm/dev_cluster exec {asked.folder} {asked.node} -- COMMAND"
        )
    command = [*network.entry(state, asked.node), *words]
    os.execvpe(command[0], command, state.environ | {"SLURMD_NODENAME": asked.node})


def _start_node(state: State, node: str) -> None:
    nodes.start(state, node)
    wait_until(lambda: state.is_alive(nodes.daemon_of(node)), within_s=1, what=f"{node}'s slurmd")


def _state(folder: Path) -> State:
    state = read_state(folder)
    if state is None:
        raise ClusterError(f"{folder}: no cluster here. Start one: slurm/dev_cluster up {folder}")
    return state


def _require_node(state: State, node: str) -> None:
    if node not in state.addresses:
        raise ClusterError(f"no node {node} here; there are {', '.join(state.addresses)}.")


VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "up": _up,
    "env": _env,
    "ps": _ps,
    "down": _down,
    "check": _check,
}
CABLES = {"cut": network.cut, "join": network.join}
FAULTS: dict[str, Callable[[State, str], None]] = {
    "kill-node": nodes.kill,
    "start-node": _start_node,
    "freeze": nodes.freeze,
    "thaw": nodes.thaw,
}
