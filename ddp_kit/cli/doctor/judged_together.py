"""Rank 0's judgement of what the ranks have found out together: network, addresses, disk."""

from collections.abc import Mapping, Sequence
from typing import Any

from ddp_kit.cli.doctor.check import Check, Facts, ranks_in_words, size_text
from ddp_kit.errors import some
from ddp_kit.io.listening import is_local

MB = 1e6
SLOW_FSYNC_S = 1.0
# Against the fastest pair of its kind.
SLOWER = 4.0
# Between nodes: of 100 and of 10 Mbit/s.
SLOW = 12.5 * MB
USELESS = 1.25 * MB


def sum_line(told: Facts, *, world_size: int) -> Check:
    """A sum over all ranks is right, and how fast."""
    behind = {rank: told[rank]["error"] for rank in told if told[rank]["error"]}
    silent = [rank for rank in range(world_size) if rank not in told]
    if behind or silent:
        said = [f"rank {rank}: {error}" for rank, error in behind.items()]
        if silent:
            said.append(f"{ranks_in_words(silent)} did not answer")
        return Check(
            name="sum",
            verdict="FAIL",
            figure=some(said),
            advice="look at the network between them (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
        )
    wrong = [rank for rank in told if told[rank]["sum"]["wrong"]]
    if wrong:
        return Check(
            name="sum",
            verdict="FAIL",
            figure=f"a sum over all ranks is wrong on {ranks_in_words(wrong)}",
            advice="leave those nodes out: the network or the memory changes bits",
        )
    seconds = max(told[rank]["sum"]["seconds"] for rank in told)
    size = told[0]["sum"]["bytes"]
    rate = size / seconds / MB
    return Check(
        name="sum",
        figure=f"right to the bit; {size / MB:.3g} MB in {seconds * 1e3:.3g} ms: {rate:.4g} MB/s",
    )


def pairs_line(told: Facts, facts: Facts) -> Check:
    """The slowest pair of ranks against the fastest one, on one node and between nodes."""
    inside: dict[tuple[int, int], float] = {}
    between: dict[tuple[int, int], float] = {}
    for rank, own in told.items():
        for partner, rate in own["pairs"].items():
            pair = (min(rank, int(partner)), max(rank, int(partner)))
            nodes = {facts[one]["topology"]["node_rank"] for one in pair}
            kind = inside if len(nodes) == 1 else between
            kind[pair] = min(rate, kind.get(pair, rate))
    if not inside and not between:
        return Check(name="pairs", figure="none were tried")
    said = []
    verdict = "ok"
    for where, rates in (("on a node", inside), ("between nodes", between)):
        if not rates:
            continue
        slowest = min(rates, key=lambda pair: rates[pair])
        fastest = max(rates, key=lambda pair: rates[pair])
        if len(rates) == 1:
            said.append(f"{where} {_pair(slowest, facts)}, {rates[slowest] / MB:.4g} MB/s")
            continue
        said.append(
            f"{where} the slowest is {_pair(slowest, facts)}, {rates[slowest] / MB:.4g} MB/s; "
            f"the fastest {_pair(fastest, facts)}, {rates[fastest] / MB:.4g} MB/s"
        )
        if rates[slowest] * SLOWER < rates[fastest]:
            verdict = "warn"
    if between and min(between.values()) < SLOW:
        verdict = "warn"
    if between and min(between.values()) < USELESS:
        verdict = "FAIL"
    figure = ". ".join(said)
    if verdict == "ok":
        return Check(name="pairs", figure=figure)
    return Check(
        name="pairs",
        verdict="FAIL" if verdict == "FAIL" else "warn",
        figure=figure,
        advice="the slowest pair slows every step: another interface, other nodes, free cores",
    )


def _pair(pair: tuple[int, int], facts: Facts) -> str:
    """Returns two ranks with their hosts, if those differ."""
    first, second = pair
    hosts = [facts[rank]["host"] for rank in pair]
    if hosts[0] == hosts[1]:
        return f"ranks {first} and {second}"
    return f"ranks {first} ({hosts[0]}) and {second} ({hosts[1]})"


def listening_line(told: Facts, *, nodes: int) -> Check:
    """At which addresses the ranks and their store wait for connections."""
    found: dict[str, list[int]] = {}
    for rank, own in told.items():
        for address in own["listening"]:
            found.setdefault(address, []).append(rank)
    if not found:
        return Check(name="addresses", figure="nobody listens")
    is_open = [address for address in found if not is_local(address)]
    named = some([f"{address} ({ranks_in_words(found[address])})" for address in found])
    if nodes == 1 and is_open:
        named = some([f"{address} ({ranks_in_words(found[address])})" for address in is_open])
        return Check(
            name="addresses",
            verdict="warn",
            figure=f"other hosts reach {named}",
            advice="one node needs none: start with ddp-kit run, or shut the port to others",
        )
    if is_open:
        return Check(name="addresses", figure=f"{named}: a network of the ranks alone")
    return Check(name="addresses", figure=f"{named}: this host alone")


def disk_lines(
    disks: Mapping[int, Mapping[str, Any]],
    *,
    home: str,
    size: int,
    keep: int,
    unseen: Sequence[int],
) -> list[Check]:
    """The run directory's disk works on each node, is one for all, and has room.

    Args: `disks` by rank; `size` of a checkpoint, 0 if not known; `unseen` the ranks that do not
        see rank 0's files.
    """
    return [
        _writing(disks, home=home),
        _room(disks, size=size, keep=keep),
        _seen(unseen, home=home),
    ]


def _writing(disks: Mapping[int, Mapping[str, Any]], *, home: str) -> Check:
    failed = [f"rank {rank}: {disk['error']}" for rank, disk in disks.items() if disk["error"]]
    if failed:
        return Check(
            name="disk",
            verdict="FAIL",
            figure=f"{home}: {some(failed)}",
            advice="make room or give the right to write there, or type another --run-dir",
        )
    slowest = max(disk["fsync_s"] for disk in disks.values())
    rate = min(disk["rate"] for disk in disks.values())
    figure = f"{home}: renames, fsync {slowest * 1e3:.3g} ms, writes {rate / MB:.4g} MB/s"
    if slowest <= SLOW_FSYNC_S:
        return Check(name="disk", figure=figure)
    return Check(
        name="disk",
        verdict="warn",
        figure=figure,
        advice="saves will take long: another file system, or a larger --save-minutes",
    )


def _room(disks: Mapping[int, Mapping[str, Any]], *, size: int, keep: int) -> Check:
    free = min(disk["free"] for disk in disks.values())
    if not size:
        figure = f"{size_text(free)} free; --checkpoint-gib says what is needed"
        return Check(name="room", figure=figure)
    # Beside those that are kept, the best one and the one that is being written.
    need = (keep + 2) * size
    figure = (
        f"{size_text(free)} free, {size_text(need)} needed: {keep} kept, the best and a new one of "
        f"{size_text(size)}"
    )
    if need <= free:
        return Check(name="room", figure=figure)
    return Check(
        name="room", verdict="FAIL", figure=figure, advice="make room, or a smaller --keep"
    )


def _seen(unseen: Sequence[int], *, home: str) -> Check:
    if not unseen:
        return Check(name="shared disk", figure="every rank sees what rank 0 writes")
    return Check(
        name="shared disk",
        verdict="FAIL",
        figure=f"{ranks_in_words(unseen)} does not see what rank 0 writes to {home}",
        advice="all nodes must share the file system of --run-dir",
    )


def stop_needs_s(*, size: int, rate: float, nodes: int) -> float:
    """Returns an estimate of what a stop needs: a save in flight, and one more. 0 if not known."""
    if not size or not rate:
        return 0.0
    return 2 * size / (rate * nodes)
