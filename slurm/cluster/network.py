"""The nodes' network: a namespace for each, with a host name, an address, a cable to one bridge.

A namespace lives as long as a process in it, the node's *holder*: when that ends, nothing is left
of the node but the bridge. Namespaces with names, and the machine's own addresses and routes, are
left alone: they would stay after a crash.
"""

import random
from pathlib import Path

from cluster.config import NETWORKS, controller_address
from cluster.state import State
from cluster.tools import ClusterError, output_of, tool, wait_until

# nobody's hardware address
LOST = "02:00:00:00:00:01"
PROBE = """\
PATH=$PATH:/usr/sbin:/sbin
ip link add probe type bridge && ip link add name probe0 type veth peer name probe1 && hostname probe && mount --bind /dev/null /dev/null
"""  # noqa: E501  (bash reads it)
# In a node's namespaces: its names, and no name server, which could not be reached; unanswered,
# each reverse look-up takes 10 s.
HOLD = """\
PATH=$PATH:/usr/sbin:/sbin
hostname "$1" && ip link set lo up || exit 1
for file in hosts resolv.conf; do [ ! -e /etc/$file ] || mount --bind "$2/etc/$file" "$(readlink -f /etc/$file)" || exit 1; done
: >"$2/run/$1.held" && exec sleep infinity
"""  # noqa: E501  (bash reads it)


def why_not() -> str:
    """Returns why this process may not make namespaces, "" if it may."""
    try:
        output_of([tool("unshare"), "--net", "--uts", "--mount", "sh", "-c", PROBE])
    except ClusterError as error:
        return str(error).rpartition(": ")[2].strip()
    return ""


def bridge_of(number: int) -> str:
    """Returns the name of a network's bridge."""
    return f"ddpk{number}"


def make_bridge(taken_before: int | None = None) -> int:
    """Makes the bridge of a network that no other cluster has.

    Returns: the network's number. Raises: ClusterError if all are taken.
    """
    begin = taken_before
    if begin is None:
        begin = random.randrange(NETWORKS)
    for offset in range(NETWORKS):
        number = (begin + offset) % NETWORKS
        prefix = controller_address(number).rpartition(".")[0]
        if prefix in output_of([tool("ip"), "-4", "addr", "show"]):
            continue
        try:
            # its name is the lock: a second one is refused
            output_of([tool("ip"), "link", "add", bridge_of(number), "type", "bridge"])
        except ClusterError as error:
            if "File exists" not in str(error):
                raise
            continue
        return number
    raise ClusterError(
        f"all {NETWORKS} networks for clusters are taken: `ip link show type bridge` lists them."
    )


def connect_bridge(number: int) -> None:
    """Gives the bridge the controller's address."""
    output_of(
        [tool("ip"), "addr", "add", f"{controller_address(number)}/24", "dev", bridge_of(number)]
    )
    output_of([tool("ip"), "link", "set", bridge_of(number), "up"])


def remove_bridge(number: int) -> None:
    """Removes a network's bridge, if it is still there."""
    known = output_of([tool("ip"), "-o", "link", "show", "type", "bridge"])
    if bridge_of(number) in known.replace(":", " ").split():
        output_of([tool("ip"), "link", "delete", bridge_of(number)])


def hold(state: State, node: str) -> None:
    """Starts the node's holder and plugs the node in."""
    assert state.network is not None
    unshared = [tool("unshare"), "--net", "--uts", "--mount"]
    state.start(holder_of(node), [*unshared, "sh", "-c", HOLD, "sh", node, str(state.folder)])
    held = state.folder / "run" / f"{node}.held"
    wait_until(
        lambda: held.exists() or not state.is_alive(holder_of(node)),
        within_s=10,
        what=f"the namespaces of {node}",
    )
    if not held.exists():
        said = (state.folder / "log" / f"{holder_of(node)}.out").read_text().strip()
        raise ClusterError(f"{node} has no namespaces: {said}")
    cable = _cable(state, node)
    pid = str(state.pids[holder_of(node)][0])
    output_of(
        [tool("ip"), "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", pid]
    )
    output_of([tool("ip"), "link", "set", cable, "master", bridge_of(state.network), "up"])
    _inside(state, node, "addr", "add", f"{state.addresses[node]}/24", "dev", "eth0")
    _inside(state, node, "link", "set", "eth0", "up")


def holder_of(node: str) -> str:
    """Returns the name under which a node's holder is known."""
    return f"holder-{node}"


def entry(state: State, node: str) -> list[str]:
    """Returns the start of a command that runs on a node: with its network, host name and hosts."""
    if state.network is None:
        return []
    pid, _ = state.pids[holder_of(node)]
    # --root: entering a mount namespace leaves a chroot. --wd: it leaves the working directory, too
    return [
        tool("nsenter"),
        f"--target={pid}",
        "--net",
        "--uts",
        "--mount",
        "--root",
        f"--wd={Path.cwd()}",
    ]


def cut(state: State, node: str, *, peer: str | None) -> None:
    """Unplugs a node, or loses its packets to and from one other node in silence."""
    _require(state)
    if peer is None:
        output_of([tool("ip"), "link", "set", _cable(state, node), "down"])
        return
    # a route to nowhere would be reported as an error; a wrong neighbour is not
    for one, other in ((node, peer), (peer, node)):
        neighbour = ("neigh", "replace", state.addresses[other], "lladdr", LOST)
        _inside(state, one, *neighbour, "dev", "eth0", "nud", "permanent")


def join(state: State, node: str, *, peer: str | None) -> None:
    """Undoes `cut`; what was not cut is no matter."""
    _require(state)
    if peer is None:
        output_of([tool("ip"), "link", "set", _cable(state, node), "up"])
        return
    for one, other in ((node, peer), (peer, node)):
        show = [tool("ip"), "neigh", "show", state.addresses[other]]
        if LOST in output_of([*entry(state, one), *show]):
            _inside(state, one, "neigh", "delete", state.addresses[other], "dev", "eth0")


def _require(state: State) -> None:
    if state.network is None:
        raise ClusterError(
            "cut and join need nodes with a network of their own: "
            "start the cluster without --no-netns, as root."
        )


def _cable(state: State, node: str) -> str:
    assert state.network is not None
    return f"{bridge_of(state.network)}n{list(state.addresses).index(node)}"


def _inside(state: State, node: str, *words: str) -> None:
    output_of([*entry(state, node), tool("ip"), *words])
