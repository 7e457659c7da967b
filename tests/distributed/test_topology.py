"""Rank facts from torchrun's variables, SLURM's or none: complete, or an error that lists what was found."""

import pytest

from ddp_kit.distributed.topology import (
    Topology,
    environment_default,
    expand_tasks,
    facts,
    first_host,
    is_first_rank,
    read_topology,
)
from ddp_kit.errors import ConfigError

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
AGENT = {
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "n[3-4]",
    "SLURM_STEP_TASKS_PER_NODE": "2,3",
}


def places(topology: Topology) -> tuple[int, ...]:
    return (
        topology.rank, topology.local_rank, topology.world_size, topology.local_world_size, topology.node_rank, topology.nodes
    )  # fmt: skip


def test_without_variables_there_is_one_process() -> None:
    topology = read_topology({})
    assert places(topology) == (0, 0, 1, 1, 0, 1)
    assert topology.launcher == "none"
    assert topology.source["rank"] == "one process: neither RANK nor SLURM_PROCID is set"


def test_torchruns_variables_are_read_and_named_as_the_source() -> None:
    topology = read_topology(TORCHRUN | AGENT)
    assert places(topology) == (5, 1, 8, 4, 1, 2)
    assert (topology.launcher, topology.rendezvous_host, topology.port) == (
        "torchrun",
        "node0",
        29500,
    )
    assert facts(topology).startswith(
        "rank=5 (RANK), local_rank=1 (LOCAL_RANK), world_size=8 (WORLD_SIZE), local_world_size=4"
    )


def test_without_an_agent_all_ranks_are_on_one_node_unless_local_world_size_says_otherwise() -> (
    None
):
    assert places(read_topology(TORCHRUN | {"LOCAL_RANK": "5"})) == (5, 5, 8, 8, 0, 1)
    assert places(read_topology(TORCHRUN | {"LOCAL_WORLD_SIZE": "4"})) == (5, 1, 8, 4, 1, 2)
    deepspeed = read_topology(TORCHRUN | {"LOCAL_SIZE": "4"})
    assert places(deepspeed) == (5, 1, 8, 4, 1, 2)
    assert deepspeed.source["local_world_size"] == "LOCAL_SIZE"


def test_torchrun_inside_a_slurm_job_wins_over_slurms_variables() -> None:
    assert read_topology(SLURM | TORCHRUN | AGENT).launcher == "torchrun"


def test_slurms_step_variables_are_read() -> None:
    topology = read_topology(SLURM)
    assert places(topology) == (3, 1, 5, 3, 1, 2)
    assert (topology.launcher, topology.rendezvous_host) == ("slurm", "n3")
    assert 20000 <= topology.port < 30000
    others = (
        {"SLURM_RESTART_COUNT": "1"},
        {"SLURM_STEP_ID": "1"},
        {"SLURM_JOB_ID": "78"},
    )  # the last life's may be taken still
    assert len({read_topology(SLURM | other).port for other in others} | {topology.port}) == 4


def test_the_shell_of_an_sbatch_script_is_no_rank() -> None:
    assert read_topology(SLURM | {"SLURM_STEP_ID": "4294967290"}).launcher == "none"


@pytest.mark.parametrize(
    "missing", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
)
def test_half_of_torchruns_variables_are_listed(missing: str) -> None:
    found = {name: value for name, value in TORCHRUN.items() if name != missing}
    listed = ", ".join(f"{name}={value}" for name, value in found.items())
    with pytest.raises(
        ConfigError,
        match=f"rank variables are half set. Found {listed}; missing {missing}. Start the ranks with torchrun",
    ):
        read_topology(found)


@pytest.mark.parametrize(
    "missing",
    ["SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"],
)
def test_half_of_slurms_variables_are_listed(missing: str) -> None:
    with pytest.raises(
        ConfigError,
        match=f"half set. Found SLURM_PROCID=3, .*; missing {missing}. Start the ranks with srun",
    ):
        read_topology({name: value for name, value in SLURM.items() if name != missing})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "one"}, "RANK='one' is not an integer"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' is not an integer"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is not an integer"),
        (
            {"RANK": "8"},
            r"rank variables contradict each other: rank=8 \(RANK\), .*world_size=8 \(WORLD_SIZE\)",
        ),
        ({"RANK": "-1"}, "contradict each other: rank=-1"),
        ({"WORLD_SIZE": "0"}, "contradict each other"),
        ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"}, "contradict each other"),
        ({"LOCAL_WORLD_SIZE": "9"}, "contradict each other"),
        ({"LOCAL_WORLD_SIZE": "0"}, "contradict each other"),
    ],
)
def test_values_that_cannot_be_are_refused(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_topology(TORCHRUN | changes)


def test_a_node_outside_slurms_list_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="SLURM_NODEID=2 is outside SLURM_STEP_TASKS_PER_NODE=2,3"
    ):
        read_topology(SLURM | {"SLURM_NODEID": "2"})


def test_slurms_shorthands() -> None:
    assert expand_tasks("2(x3),1") == [2, 2, 2, 1]
    assert [
        first_host(text) for text in ("n1", "n1,n2", "n[3-5,9],m1", "rack[07-12]-a", "a1,b[2-3]")
    ] == [
        "n1",
        "n1",
        "n3",
        "rack07-a",
        "a1",
    ]
    for unreadable in ("2(xa)", "two", ""):
        with pytest.raises(ConfigError, match="cannot be read; expected something like"):
            expand_tasks(unreadable)


@pytest.mark.parametrize(
    ("variables", "is_first"),
    [
        ({}, True),
        ({"RANK": "0"}, True),
        ({"RANK": "1"}, False),
        ({"SLURM_PROCID": "2"}, False),
        ({"WORLD_SIZE": "4"}, True),
    ],
)
def test_one_rank_speaks_for_all_even_if_the_variables_are_half_set(
    variables: dict[str, str], is_first: bool
) -> None:
    assert is_first_rank(variables) == is_first


def test_a_default_is_set_for_a_while_and_never_over_a_users_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import os

    monkeypatch.setenv("SET_BY_THE_USER", "theirs")
    monkeypatch.delenv("NOT_SET", raising=False)
    with environment_default("SET_BY_THE_USER", "ours"), environment_default("NOT_SET", "ours"):
        assert (os.environ["SET_BY_THE_USER"], os.environ["NOT_SET"]) == ("theirs", "ours")
    assert "NOT_SET" not in os.environ
