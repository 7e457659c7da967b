"""The rank facts and the GPUs that real SLURM steps give to ddp_kit."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from clusters import Cluster
from paths import ROOT

ROOT = str(ROOT)
# What each rank prints. It imports no torch, so that a step takes a tenth of a second.
PROBE = """
import json, os, sys
from dataclasses import asdict
from ddp_kit.distributed.topology import read_topology
assert "torch" not in sys.modules
visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
print(json.dumps(asdict(read_topology()) | {"node": os.environ["SLURMD_NODENAME"], "visible": visible.split(",") if visible else []}))
"""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Runs steps whose ranks print what they found."""

    cluster: Cluster
    probe: Path

    @property
    def command(self) -> str:
        return f"{sys.executable} {self.probe}"

    def run(self, *words: str) -> list[dict[str, Any]]:
        """Returns what the ranks of a job of one step found, by rank."""
        return by_rank(
            self.cluster.run("srun", *words, sys.executable, str(self.probe), PYTHONPATH=ROOT)
        )

    def batch(self, script: str, *words: str, outputs: str) -> list[list[dict[str, Any]]]:
        """Returns the same for several steps of one job, or for the elements of an array, one for each name in `outputs`."""
        path = self.probe.with_suffix(".sh")
        path.write_text(f"#!/bin/sh\nset -e\n{script}\n")
        folder = self.probe.parent
        job = self.cluster.submit(
            *words, f"--chdir={folder}", "--output=log", str(path), PYTHONPATH=ROOT
        )
        self.cluster.wait(job, state="COMPLETED")
        return [by_rank((folder / name).read_text()) for name in outputs.split()]


def by_rank(output: str) -> list[dict[str, Any]]:
    found = sorted(map(json.loads, output.splitlines()), key=lambda facts: facts["rank"])
    assert [facts["rank"] for facts in found] == list(range(len(found)))
    return found


def places(found: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """Returns (local_rank, world_size, local_world_size, node_rank, nodes) of each rank."""
    return [
        tuple(
            facts[name]
            for name in ("local_rank", "world_size", "local_world_size", "node_rank", "nodes")
        )
        for facts in found
    ]


def devices(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Returns each rank's node and the device it takes."""
    return [
        (facts["node"], facts["visible"][facts["local_rank"] % len(facts["visible"])])
        for facts in found
    ]


@pytest.fixture
def steps(cluster: Cluster, tmp_path: Path) -> Steps:
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    return Steps(cluster=cluster, probe=probe)


def test_the_ranks_of_real_steps_know_their_places(steps: Steps) -> None:
    script = f"""
        srun --nodes=1 --ntasks=1 {steps.command} >one
        srun --ntasks=4 --ntasks-per-node=2 {steps.command} >even
        srun --ntasks=4 --distribution=plane=3 {steps.command} >uneven
        srun --nodes=1 --ntasks=2 --relative=1 {steps.command} >smaller
        srun --nodes=1 --ntasks=1 --exact {steps.command} >left & srun --nodes=1 --ntasks=1 --exact {steps.command} >right & wait
    """
    names = "one even uneven smaller left right"
    one, even, uneven, smaller, left, right = steps.batch(
        script, "--nodes=2", "--ntasks=6", "--exclusive", outputs=names
    )
    assert places(one) == [(0, 1, 1, 0, 1)]
    assert places(even) == [(0, 4, 2, 0, 2), (1, 4, 2, 0, 2), (0, 4, 2, 1, 2), (1, 4, 2, 1, 2)]
    assert places(uneven) == [(0, 4, 3, 0, 2), (1, 4, 3, 0, 2), (2, 4, 3, 0, 2), (0, 4, 1, 1, 2)]
    assert places(smaller) == [(0, 2, 2, 0, 1), (1, 2, 2, 0, 1)]
    for found, master in ((one, "n0"), (even, "n0"), (uneven, "n0"), (smaller, "n1")):
        assert {(facts["launcher"], facts["rendezvous_host"]) for facts in found} == {
            ("slurm", master)
        }
        assert found[0]["node"] == master  # rank 0 is where the others look for it
        assert len({facts["port"] for facts in found}) == 1
    assert left[0]["port"] != right[0]["port"]  # steps that run at the same time


def test_elements_of_an_array_are_worlds_of_their_own(steps: Steps) -> None:
    script = f"srun {steps.command} >$SLURM_ARRAY_TASK_ID"
    first, second = steps.batch(
        script, "--array=3,4", "--nodes=2", "--ntasks-per-node=2", outputs="3 4"
    )
    assert (
        places(first)
        == places(second)
        == [(0, 4, 2, 0, 2), (1, 4, 2, 0, 2), (0, 4, 2, 1, 2), (1, 4, 2, 1, 2)]
    )
    assert first[0]["port"] != second[0]["port"]  # they may share a node


@pytest.mark.parametrize(
    ("words", "visible"),
    [
        (["--gpus-per-node=2"], 2),
        (["--gpus-per-task=1"], 1),
        (["--gpus-per-node=2", "--gpu-bind=single:1"], 1),
        (["--gres=gpu:2"], 2),
    ],
)
def test_however_gpus_are_asked_for_each_rank_has_its_own(
    steps: Steps, words: list[str], visible: int
) -> None:
    found = steps.run("--nodes=2", "--ntasks-per-node=2", *words)
    assert {len(facts["visible"]) for facts in found} == {visible}
    assert devices(found) == [("n0", "0"), ("n0", "1"), ("n1", "0"), ("n1", "1")]


def test_without_gpus_none_are_visible(steps: Steps) -> None:
    assert [facts["visible"] for facts in steps.run("--nodes=1", "--ntasks=2")] == [[], []]


def test_two_jobs_on_one_node_have_different_gpus_and_ports(steps: Steps) -> None:
    script = f"srun {steps.command} >$SLURM_ARRAY_TASK_ID; touch $SLURM_ARRAY_TASK_ID.done; while [ ! -e 1.done -o ! -e 2.done ]; do sleep 0.05; done"
    first, second = steps.batch(
        script, "--array=1,2", "--nodelist=n1", "--ntasks=2", "--gpus-per-node=2", outputs="1 2"
    )
    assert sorted(devices(first) + devices(second)) == [
        ("n1", "0"),
        ("n1", "1"),
        ("n1", "2"),
        ("n1", "3"),
    ]
    assert first[0]["port"] != second[0]["port"]
