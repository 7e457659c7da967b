"""How ranks find each other, and what is said of nodes that do not come."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ddp_kit import process_group
from ddp_kit.distributed import node_check
from ddp_kit.distributed.node_check import NodesError
from ddp_kit.distributed.rendezvous import _telling
from ddp_kit.distributed.topology import Topology, environment_default, read_topology
from ddp_kit.testing import run_ranks

JOB = {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "127.0.0.1",
    "SLURM_STEP_TASKS_PER_NODE": "2",
}


def task(rank: int) -> Topology:
    return read_topology(JOB | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})


def sum_of_ranks(job: dict[str, str]) -> float:
    """The sum of rank + 1 over the ranks of a SLURM step."""
    JOB.update(job)
    rank = int(os.environ["RANK"])
    with process_group(topology=task(rank), device="cpu", first_timeout_s=30) as group:
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total, group=group.control_pg)
    return float(total)


@contextmanager
def silent(port: int) -> Iterator[None]:
    with socket.create_server(("127.0.0.1", port)):
        yield


@contextmanager
def of_another_job(port: int) -> Iterator[None]:
    listener = socket.create_server(("127.0.0.1", port))
    with _telling("another-job 1\n", listener):
        yield


def differently_counted(job: dict[str, str]) -> float:
    with environment_default("TORCHELASTIC_RESTART_COUNT", os.environ["RANK"]):
        return sum_of_ranks(job)


def test_agents_that_count_restarts_differently_do_not_part_the_ranks() -> None:
    assert run_ranks(differently_counted, 2, JOB, group=False) == [3.0, 3.0]


@pytest.mark.parametrize("taken", [silent, of_another_job])
def test_a_derived_port_that_is_taken_is_not_where_the_ranks_meet(
    taken: Callable[[int], Iterator[None]],
) -> None:
    with taken(task(0).port):
        assert run_ranks(sum_of_ranks, 2, JOB, group=False) == [3.0, 3.0]


def test_a_given_port_is_the_only_one() -> None:
    assert len(set(task(0).ports)) == 8
    assert read_topology(JOB | {"SLURM_PROCID": "0", "MASTER_PORT": "29500"}).ports == [29500]


def stuck(*args: object, **more: object) -> None:
    time.sleep(4)
    raise RuntimeError("at last")


def on_two_nodes(folder: str, port: int, what: str, launcher: str = "slurm") -> str:
    """One rank on each of two nodes. Returns what the check says, "" if all is well."""
    rank = int(os.environ["RANK"])
    if (what, rank) in (("absent", 1), ("first absent", 0)):
        return "not there"
    if (what, rank) == ("stuck", 1):
        dist.init_process_group = stuck
    node_check.LATER_S = 1.0
    place = Topology(
        rank=rank,
        world_size=2,
        node_rank=rank,
        nodes=2,
        launcher=launcher,
        rendezvous_host="127.0.0.1",
        port=port,
    )
    device = "cuda" if (what, rank) == ("no device", 1) else "cpu"
    try:
        with process_group(topology=place, device=device, run_dir=Path(folder)) as group:
            dist.all_reduce(torch.zeros(1), group=group.control_pg)
    except NodesError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "bad", "words"),
    [
        ("well", "", ""),
        ("absent", "n1", "n1: 0 of its ranks came"),
        pytest.param("first absent", "n0", "n0: its store was not reached", marks=pytest.mark.slow),
        ("no device", "n1", "n1: no CUDA device is visible to 1 of its ranks"),
        ("stuck", "n1", "n1: its ranks hang or are gone"),
    ],
)
def test_the_preflight_check_names_the_node_that_failed_it(
    what: str, bad: str, words: str, tmp_path: Path
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        port = found.getsockname()[1]
    env = {"DDP_KIT_PREFLIGHT_S": "2", "DDP_KIT_HOSTS": "n0,n1", "GLOO_SOCKET_IFNAME": "lo"}
    said = run_ranks(on_two_nodes, 2, str(tmp_path / "run"), port, what, group=False, env=env)
    assert [
        words in text or text == "not there" or (what, rank) == ("stuck", 1)
        for rank, text in enumerate(said)
    ] == [True, True], said
    file = tmp_path / "run" / "bad_nodes"
    assert (file.read_text() if file.exists() else "") == (f"{bad}\n" if bad else "")


def of_torchrun(folder: str, port: int) -> str:
    with environment_default("SLURMD_NODENAME", f"m{os.environ['RANK']}"):
        return on_two_nodes(folder, port, "no device", "torchrun")


def test_nodes_that_torchrun_has_numbered_are_named_by_themselves(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as found:
        port = found.getsockname()[1]
    env = {"DDP_KIT_PREFLIGHT_S": "2", "DDP_KIT_HOSTS": "m1,m0", "GLOO_SOCKET_IFNAME": "lo"}
    said = run_ranks(of_torchrun, 2, str(tmp_path / "run"), port, group=False, env=env)
    assert ["m1: no CUDA device is visible" in text for text in said] == [True, True], said
    assert (tmp_path / "run" / "bad_nodes").read_text() == "m1\n"
