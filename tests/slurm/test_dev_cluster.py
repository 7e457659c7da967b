"""`slurm/dev_cluster`: a real SLURM that starts anywhere, has real faults, and leaves nothing."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from clusters import PROGRAM, Cluster, becomes, cluster_up, dev_cluster, traces

pytestmark = pytest.mark.slurm
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="root's clusters have network namespaces")


def interfaces(folder: Path) -> set[str]:
    """Returns the network interfaces of the cluster in a folder, as the machine has them."""
    number = json.loads((folder / "cluster.json").read_text())["network"]
    return {
        path.name
        for path in Path("/sys/class/net").iterdir()
        if re.fullmatch(rf"ddpk{number}(n\d+)?", path.name)
    }


@is_root
def test_nothing_is_left_whatever_was_done_to_the_nodes(cluster_folder: Path) -> None:
    with cluster_up(cluster_folder, "--nodes=3", "--gpus=2") as cluster:
        assert len(interfaces(cluster_folder)) == 4
        words = [
            "srun",
            "--nodes=3",
            "bash",
            "-c",
            "setsid --fork sleep 1000; touch $SLURMD_NODENAME; sleep 1000",
        ]
        with subprocess.Popen(
            words, env=cluster.environ, cwd=cluster_folder, stderr=subprocess.DEVNULL
        ) as waiting:
            assert becomes(
                lambda: all((cluster_folder / name).exists() for name in ("n0", "n1", "n2")),
                within_s=10,
            )
            assert becomes(
                lambda: len(cluster.control("ps").splitlines()) == 9, within_s=5
            )  # a step daemon and two sleeps on each node
            cluster.control("freeze", "n0")
            cluster.control("kill-node", "n1")
            names = interfaces(cluster_folder)
            begin = time.monotonic()
            done = dev_cluster("down", cluster_folder)
            assert done.returncode == 0, done.stderr
            assert time.monotonic() - begin < 10
            waiting.wait(timeout=5)
        assert not traces(cluster_folder)
        # the kernel takes the ends of a cable away after the name space that held one of them
        assert becomes(
            lambda: not names & {path.name for path in Path("/sys/class/net").iterdir()},
            within_s=5,
        )
        assert not (cluster_folder / "cluster.json").exists()
        assert (cluster_folder / "log" / "slurmctld.log").stat().st_size


def test_two_clusters_live_side_by_side(cluster: Cluster, cluster_folder: Path) -> None:
    with cluster_up(cluster_folder, "--nodes=1", "--prefix=other") as other:
        assert other.run("srun", "bash", "-c", "echo $SLURMD_NODENAME") == "other0\n"
        assert sorted(
            cluster.run("srun", "--nodes=2", "bash", "-c", "echo $SLURMD_NODENAME").split()
        ) == ["n0", "n1"]
    assert cluster.node_states() == {"n0": "idle", "n1": "idle"}


def test_jobs_see_fake_gpus_the_same_files_and_this_python(
    cluster: Cluster, tmp_path: Path
) -> None:
    code = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], sys.executable)"
    job = cluster.submit(
        "--gpus-per-node=3", f"--output={tmp_path}/out", f'--wrap=srun {sys.executable} -c "{code}"'
    )
    cluster.wait(job, state="COMPLETED")
    assert (tmp_path / "out").read_text().split() == ["0,1,2", sys.executable]
    refused = cluster.tried("sbatch", "--gpus-per-node=5", "--wrap=true")
    assert refused.returncode == 1
    assert "Requested node configuration is not available" in refused.stderr
    job = cluster.submit(
        "--partition=short", "--time=61", "--wrap=true"
    )  # unless EnforcePartLimits is set, SLURM takes it and never runs it
    assert becomes(lambda: cluster.facts(job)["Reason"] == "PartitionTimeLimit", within_s=10)
    cluster.run("scancel", job)


NAMES = """
import json, socket, time
begin = time.monotonic()
own = socket.gethostname()
peer = {"n0": "n1", "n1": "n0"}[own]
address = socket.gethostbyname(peer)
name = socket.gethostbyaddr(address)[0]
with socket.socket() as probe:
    probe.bind((socket.gethostbyname(own), 0))
print(json.dumps([own, peer, name, address, time.monotonic() - begin < 2]))
"""


@is_root
def test_host_names_resolve_in_jobs_and_belong_to_the_node(cluster: Cluster) -> None:
    lines = cluster.run("srun", "--nodes=2", sys.executable, "-c", NAMES).splitlines()
    (own0, peer0, name0, address0, is_quick0), (own1, peer1, name1, address1, is_quick1) = sorted(
        map(json.loads, lines)
    )
    assert (own0, peer0, name0) == ("n0", "n1", "n1")
    assert (own1, peer1, name1) == ("n1", "n0", "n0")
    assert address0 != address1
    assert is_quick0
    assert is_quick1
    assert cluster.control("exec", "n1", "--", "hostname") == "n1\n"


def test_what_a_job_leaves_behind_is_found(cluster: Cluster) -> None:
    cluster.run("srun", "--nodelist=n1", "bash", "-c", "setsid --fork sleep 1234 <&- >&- 2>&-")
    found = cluster.left(within_s=1)
    assert len(found) == 1
    assert found[0].startswith("process left on n1 ")
    assert found[0].endswith(" sleep 1234")
    os.kill(int(found[0].split()[4]), 9)
    job = cluster.submit("--wrap=sleep 1000")
    cluster.wait(job, state="RUNNING")
    assert f"job {job} (wrap) is RUNNING" in cluster.left(within_s=0)
    cluster.run("scancel", "--full", job)


def test_a_killed_node_runs_nothing_and_comes_back(cluster: Cluster) -> None:
    job = cluster.submit("--nodelist=n1", "--no-requeue", "--wrap=sleep 1000")
    assert becomes(lambda: "sleep 1000" in cluster.control("ps"), within_s=10)
    cluster.control("kill-node", "n1")
    assert cluster.control("ps") == ""
    cluster.control("kill-node", "n1")  # as dead as before
    cluster.run("scancel", job)
    cluster.control("start-node", "n1")
    cluster.control("start-node", "n1")
    assert becomes(lambda: cluster.node_states()["n1"] == "idle", within_s=15)
    assert sorted(
        cluster.run("srun", "--nodes=2", "bash", "-c", "echo $SLURMD_NODENAME").split()
    ) == ["n0", "n1"]


def test_a_frozen_node_hangs_and_a_thawed_one_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counting = f"for i in $(seq 1000); do echo $i >>{counter}; [ ! -e {tmp_path}/end ] || exit 0; sleep 0.05; done; exit 1"
    job = cluster.submit("--nodelist=n1", f"--wrap=srun bash -c '{counting}'")
    assert becomes(counter.exists, within_s=10)
    cluster.control("freeze", "n1")
    frozen = counter.read_text()
    time.sleep(0.3)
    assert counter.read_text() == frozen
    assert cluster.state(job) == "RUNNING"
    cluster.control("thaw", "n1")
    assert becomes(lambda: counter.read_text() != frozen, within_s=5)
    (tmp_path / "end").touch()
    cluster.wait(job, state="COMPLETED")


@is_root
def test_a_cut_is_felt_by_those_who_are_cut_and_by_nobody_else(cluster: Cluster) -> None:
    def reaches(node: str, peer: str) -> str:
        code = f"timeout 0.4 bash -c 'echo >/dev/tcp/{peer}/9' 2>/dev/null; echo $?"
        return {"1": "reached", "124": "lost"}[
            cluster.control("exec", node, "--", "bash", "-c", code).strip()
        ]  # refused by a host that is there

    assert reaches("n0", "n1") == "reached"
    cluster.control("cut", "n0", "n1")
    assert reaches("n0", "n1") == reaches("n1", "n0") == "lost"
    assert sorted(
        cluster.run("srun", "--nodes=2", "bash", "-c", "echo $SLURMD_NODENAME").split()
    ) == ["n0", "n1"]
    cluster.control("join", "n0", "n1")
    cluster.control("join", "n0", "n1")
    assert becomes(lambda: reaches("n1", "n0") == "reached", within_s=5)
    cluster.control("cut", "n1")
    assert reaches("n0", "n1") == "lost"
    cluster.control("join", "n1")
    assert becomes(lambda: reaches("n0", "n1") == "reached", within_s=5)


def test_sacct_answers_submitit_without_accounting(cluster: Cluster) -> None:
    job = cluster.submit("--array=0,1", "--nodes=1", "--wrap=exit $SLURM_ARRAY_TASK_ID")
    single = cluster.submit("--nodelist=n1", "--wrap=true")
    cluster.wait(job, state="COMPLETED FAILED")
    cluster.wait(single, state="COMPLETED")
    found = cluster.run(
        "sacct", "-o", "JobID,State,NodeList", "--parsable2", "-j", job, "-j", single
    ).splitlines()
    assert found[0] == "JobID|State|NodeList"
    assert {line.rpartition("|")[0] for line in found[1:]} == {
        f"{job}_0|COMPLETED",
        f"{job}_1|FAILED",
        f"{single}|COMPLETED",
    }


def test_a_cluster_ends_with_the_process_that_it_was_started_for(cluster_folder: Path) -> None:
    assert dev_cluster("up", cluster_folder, "--nodes=1").returncode == 0
    with subprocess.Popen(["sleep", "5"]) as owner:
        with subprocess.Popen(
            [sys.executable, PROGRAM, "down", str(cluster_folder), "--after", str(owner.pid)]
        ) as guard:
            time.sleep(0.5)
            is_waiting = guard.poll() is None and (cluster_folder / "cluster.json").exists()
            owner.kill()
            assert guard.wait(timeout=20) == 0
            assert is_waiting
    assert not traces(cluster_folder)


@pytest.mark.slow
def test_high_preempts_low_which_runs_again(cluster_folder: Path) -> None:
    with cluster_up(
        cluster_folder, "--nodes=1", "--cpus=1", "--grace-s=0", "--kill-wait-s=1"
    ) as cluster:
        script = '--wrap=echo "life ${SLURM_RESTART_COUNT:-0}"; srun bash -c "[ -n \\"$SLURM_RESTART_COUNT\\" ] || sleep 1000"'
        low = cluster.submit("--partition=low", "--open-mode=append", "--output=out", script)
        cluster.wait(low, state="RUNNING")
        high = cluster.submit("--partition=high", "--wrap=sleep 0.1")
        cluster.wait(high, state="COMPLETED")
        cluster.wait(low, state="COMPLETED", within_s=30)
        assert cluster.facts(low)["Restarts"] == "1"
        assert (
            (cluster_folder / "out").read_text().count("life 0")
            == (cluster_folder / "out").read_text().count("life 1")
            == 1
        )


@pytest.mark.slow
def test_a_node_that_is_killed_is_noticed_and_its_job_runs_elsewhere(cluster_folder: Path) -> None:
    with cluster_up(cluster_folder, "--nodes=2", "--slurmd-timeout-s=10") as cluster:
        job = cluster.submit(
            "--nodes=1",
            "--nodelist=n1",
            "--output=out",
            "--open-mode=append",
            "--wrap=echo on $SLURMD_NODENAME; sleep 1000",
        )
        cluster.wait(job, state="RUNNING")
        cluster.control("kill-node", "n1")
        assert becomes(lambda: cluster.node_states()["n1"].startswith("down"), within_s=60)
        assert cluster.facts(job)["Restarts"] == "1"
        cluster.control("start-node", "n1")
        cluster.wait_node("n1", state="idle")
        cluster.wait(job, state="RUNNING", within_s=30)
        cluster.run("scancel", job)
        assert not cluster.left()
