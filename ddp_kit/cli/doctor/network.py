"""What the ranks can only find out together: sums, the speed of each pair, clocks, who listens."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ddp_kit.cli.doctor.talk import Talk
from ddp_kit.distributed.process_group import loopback
from ddp_kit.distributed.topology import Topology, environment_default
from ddp_kit.io.listening import listening

KIB = 2**10
MIB = 2**20
# Rounds in which every rank has another partner.
ROUNDS = 8
SMALL = 64 * KIB
# An exchange or a sum takes about so long, whatever the network.
TRIAL_S = 0.1
MOST = {"cpu": 8 * MIB, "cuda": 64 * MIB}
TRIALS = 3
PINGS = 5
FLOAT = 4


@contextmanager
def joined(
    store: dist.Store, topology: Topology, device: torch.device, *, timeout: timedelta
) -> Iterator[None]:
    """Makes the process group of a doctor, and leaves it. Every rank calls it."""
    is_cuda = device.type == "cuda"
    name = loopback()
    with environment_default("GLOO_SOCKET_IFNAME", name) if topology.nodes == 1 else _nothing():
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=dist.PrefixStore("ddp_kit_doctor", store),
            rank=topology.rank,
            world_size=topology.world_size,
            timeout=timeout,
            device_id=device if is_cuda else None,
        )
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def partners(rank: int, world_size: int) -> list[int]:
    """Returns a rank's partner in each round, -1 where it has none: a round-robin tournament.

    Of many rounds some are taken, evenly.
    """
    players = world_size + world_size % 2
    most = players - 1
    rounds = range(most)
    if most > ROUNDS:
        rounds = range(0, most, -(-most // ROUNDS))
    found = []
    for turn in rounds:
        other = most if rank != most else _sitting(turn, most)
        if rank != most and (turn - rank) % most != rank:
            other = (turn - rank) % most
        found.append(other if other < world_size else -1)
    return found


def _sitting(turn: int, most: int) -> int:
    """Who is their own partner in a round of an odd number, and so plays the last one."""
    return next(rank for rank in range(most) if (turn - rank) % most == rank)


def pair_rates(topology: Topology, device: torch.device, *, timeout: timedelta) -> dict[int, float]:
    """Returns the bytes a second to and from each partner at once. Every rank calls it."""
    rates = {}
    for partner in partners(topology.rank, topology.world_size):
        if partner >= 0:
            rates[partner] = _pair_rate(partner, topology.rank, device, timeout=timeout)
    return rates


def _pair_rate(partner: int, rank: int, device: torch.device, *, timeout: timedelta) -> float:
    # The first one waits until the partner is there, too.
    _exchange(partner, torch.zeros(SMALL, dtype=torch.uint8, device=device), timeout=timeout)
    payload = torch.zeros(SMALL, dtype=torch.uint8, device=device)
    small_s, _ = _exchange(partner, payload, timeout=timeout)
    wanted = int(min(MOST[device.type], max(SMALL, SMALL * TRIAL_S / small_s)))
    own = torch.tensor([wanted], dtype=torch.int64, device=device)
    _, theirs = _exchange(partner, own, timeout=timeout)
    size = min(wanted, int(theirs))
    payload = torch.zeros(size, dtype=torch.uint8, device=device)
    best_s = min(_exchange(partner, payload, timeout=timeout)[0] for _ in range(TRIALS))
    return size / best_s


def _exchange(
    partner: int, payload: torch.Tensor, *, timeout: timedelta
) -> tuple[float, torch.Tensor]:
    """Sends to a partner and receives from it at once. Returns the seconds, and what came."""
    came = torch.empty_like(payload)
    begin = time.perf_counter()
    both = [dist.P2POp(dist.isend, payload, partner), dist.P2POp(dist.irecv, came, partner)]
    for work in dist.batch_isend_irecv(both):
        work.wait(timeout)
    if payload.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin, came


def try_sum(
    topology: Topology, device: torch.device, *, slowest: float, timeout: timedelta
) -> Mapping[str, object]:
    """Returns whether a sum over all ranks is right to the bit, and how long it took.

    Args: `slowest` bytes a second of this rank's slowest pair. Every rank calls it.
    """
    rate = torch.tensor([slowest], dtype=torch.float64, device=device)
    _reduced(rate, dist.ReduceOp.MIN, timeout=timeout)
    size = int(min(MOST[device.type], max(SMALL, float(rate) * TRIAL_S)))
    pattern = torch.arange(size // FLOAT, device=device, dtype=torch.float32) % 1024
    # Whole numbers: however they are added up, the sum has the same bits.
    world_size = topology.world_size
    expected = world_size * pattern + world_size * (world_size + 1) / 2
    best_s = float("inf")
    wrong = 0
    for _ in range(TRIALS):
        values = pattern + (topology.rank + 1)
        begin = time.perf_counter()
        _reduced(values, dist.ReduceOp.SUM, timeout=timeout)
        if values.is_cuda:
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - begin)
        wrong += int((values != expected).sum())
    return {"wrong": wrong, "bytes": size, "seconds": best_s}


def _reduced(values: torch.Tensor, op: dist.ReduceOp.RedOpType, *, timeout: timedelta) -> None:
    work = dist.all_reduce(values, op, async_op=True)
    assert work is not None
    work.wait(timeout)


def clock_skews(talk: Talk) -> Mapping[int, tuple[float, float]]:
    """Returns how far each other node's clock is ahead of rank 0's, and at most how wrong that is.

    Both in seconds, by the first rank of a node; bounded by the time that a question took, so no
    network makes a clock wrong. Rank 0 and the first rank of each node call it.
    """
    topology = talk.topology
    store = talk.store
    assert store is not None
    within = timedelta(seconds=talk.within_s)
    skews: dict[int, tuple[float, float]] = {}
    if topology.rank:
        with contextlib.suppress(dist.DistError):
            for ping in range(PINGS):
                store.wait([f"ping/{topology.node_rank}/{ping}"], within)
                store.set(f"pong/{topology.node_rank}/{ping}", repr(time.time()))
        return skews
    for node in range(1, topology.nodes):
        # A node that does not answer is missing in what is returned.
        with contextlib.suppress(dist.DistError):
            skews[node] = _skew(store, node, within=within)
    return skews


def _skew(store: dist.Store, node: int, *, within: timedelta) -> tuple[float, float]:
    best = (0.0, float("inf"))
    for ping in range(PINGS):
        begin = time.time()
        store.set(f"ping/{node}/{ping}", "")
        store.wait([f"pong/{node}/{ping}"], within)
        theirs = float(store.get(f"pong/{node}/{ping}"))
        end = time.time()
        error = (end - begin) / 2
        if error < best[1]:
            best = (theirs - (begin + end) / 2, error)
    return best


def own_listening(topology: Topology, parent: int) -> list[str]:
    """Returns where this rank listens, and torchrun's agent for it: its store is there."""
    found = list(listening("self"))
    if topology.launcher == "torchrun" and topology.local_rank == 0 and Path("/proc").is_dir():
        found += [f"{address} (torchrun's agent)" for address in listening(str(parent))]
    return found
