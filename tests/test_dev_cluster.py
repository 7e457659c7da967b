"""`slurm/dev_cluster`: a real SLURM that starts anywhere, has real faults, and leaves nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import clusters
import pytest
from clusters import PROGRAM, Cluster, cluster_up

pytestmark = pytest.mark.slurm
NOBODY = 65534
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="root's clusters have network namespaces")


def dev_cluster(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, PROGRAM, *map(str, words)], text=True, capture_output=True, timeout=60)


def traces(folder: Path) -> list[str]:
    """Returns the living processes whose command, environment or working directory knows a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            known = (process / "cmdline").read_bytes() + (process / "environ").read_bytes() + os.fsencode((process / "cwd").readlink())
        except OSError:
            continue
        is_watching = b"--after" in known or int(process.name) == os.getpid()
        if os.fsencode(folder) in known and not is_watching:
            found.append(f"{process.name}: {known[:200]!r}")
    return found


def interfaces(folder: Path) -> set[str]:
    """Returns the network interfaces of the cluster in a folder, as the machine has them."""
    number = json.loads((folder / "cluster.json").read_text())["network"]
    return {path.name for path in Path("/sys/class/net").iterdir() if re.fullmatch(rf"ddpk{number}(n\d+)?", path.name)}


def becomes(is_so: Callable[[], bool], *, within_s: float) -> bool:
    end = time.monotonic() + within_s
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("c") / "d"
    yield made
    dev_cluster("down", made)


@is_root
def test_nothing_is_left_whatever_was_done_to_the_nodes(folder: Path) -> None:
    with cluster_up(folder, "--nodes=3", "--gpus=2") as cluster:
        assert len(interfaces(folder)) == 4
        words = ["srun", "--nodes=3", "bash", "-c", "setsid --fork sleep 1000; touch $SLURMD_NODENAME; sleep 1000"]
        with subprocess.Popen(words, env=cluster.environ, cwd=folder, stderr=subprocess.DEVNULL) as waiting:
            assert becomes(lambda: all((folder / name).exists() for name in ("n0", "n1", "n2")), within_s=10)
            assert becomes(lambda: len(cluster.control("ps").splitlines()) == 9, within_s=5)  # a step daemon and two sleeps on each node
            cluster.control("freeze", "n0")
            cluster.control("kill-node", "n1")
            names = interfaces(folder)
            begin = time.monotonic()
            done = dev_cluster("down", folder)
            assert done.returncode == 0, done.stderr
            assert time.monotonic() - begin < 10
            waiting.wait(timeout=5)
        assert not traces(folder)
        assert not names & {path.name for path in Path("/sys/class/net").iterdir()}
        assert not (folder / "cluster.json").exists()
        assert (folder / "log" / "slurmctld.log").stat().st_size


def test_two_clusters_live_side_by_side(cluster: Cluster, folder: Path) -> None:
    with cluster_up(folder, "--nodes=1", "--prefix=other") as other:
        assert other.run("srun", "bash", "-c", "echo $SLURMD_NODENAME") == "other0\n"
        assert sorted(cluster.run("srun", "--nodes=2", "bash", "-c", "echo $SLURMD_NODENAME").split()) == ["n0", "n1"]
    assert cluster.node_states() == {"n0": "idle", "n1": "idle"}


def test_jobs_see_fake_gpus_the_same_files_and_this_python(cluster: Cluster, tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], sys.executable)"
    job = cluster.submit("--gpus-per-node=3", f"--output={tmp_path}/out", f'--wrap=srun {sys.executable} -c "{code}"')
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
    (own0, peer0, name0, address0, is_quick0), (own1, peer1, name1, address1, is_quick1) = sorted(map(json.loads, lines))
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
    assert sorted(cluster.run("srun", "--nodes=2", "bash", "-c", "echo $SLURMD_NODENAME").split()) == ["n0", "n1"]


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
    assert sorted(cluster.run("srun", "--nodes=2", "bash", "-c", "echo $SLURMD_NODENAME").split()) == ["n0", "n1"]
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
    found = cluster.run("sacct", "-o", "JobID,State,NodeList", "--parsable2", "-j", job, "-j", single).splitlines()
    assert found[0] == "JobID|State|NodeList"
    assert {line.rpartition("|")[0] for line in found[1:]} == {f"{job}_0|COMPLETED", f"{job}_1|FAILED", f"{single}|COMPLETED"}


def test_a_cluster_ends_with_the_process_that_it_was_started_for(folder: Path) -> None:
    assert dev_cluster("up", folder, "--nodes=1").returncode == 0
    with subprocess.Popen(["sleep", "5"]) as owner:
        with subprocess.Popen([sys.executable, PROGRAM, "down", str(folder), "--after", str(owner.pid)]) as guard:
            time.sleep(0.5)
            is_waiting = guard.poll() is None and (folder / "cluster.json").exists()
            owner.kill()
            assert guard.wait(timeout=20) == 0
            assert is_waiting
    assert not traces(folder)


@pytest.mark.slow
def test_high_preempts_low_which_runs_again(folder: Path) -> None:
    with cluster_up(folder, "--nodes=1", "--cpus=1", "--grace-s=0", "--kill-wait-s=1") as cluster:
        script = '--wrap=echo "life ${SLURM_RESTART_COUNT:-0}"; srun bash -c "[ -n \\"$SLURM_RESTART_COUNT\\" ] || sleep 1000"'
        low = cluster.submit("--partition=low", "--open-mode=append", "--output=out", script)
        cluster.wait(low, state="RUNNING")
        high = cluster.submit("--partition=high", "--wrap=sleep 0.1")
        cluster.wait(high, state="COMPLETED")
        cluster.wait(low, state="COMPLETED", within_s=30)
        assert cluster.facts(low)["Restarts"] == "1"
        assert (folder / "out").read_text().count("life 0") == (folder / "out").read_text().count("life 1") == 1


@pytest.mark.slow
def test_a_node_that_is_killed_is_noticed_and_its_job_runs_elsewhere(folder: Path) -> None:
    with cluster_up(folder, "--nodes=2", "--slurmd-timeout-s=10") as cluster:
        job = cluster.submit(
            "--nodes=1", "--nodelist=n1", "--output=out", "--open-mode=append", "--wrap=echo on $SLURMD_NODENAME; sleep 1000"
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["up", "DIR", "--nodes=0", "--gpus=-1", "--prefix=N 0"],
            "--nodes 0: expected 1 to 250; --gpus -1: expected 0 or more; --prefix 'N 0'",
        ),
        (["up", "DIR/" + "long" * 25], "characters too long for the path of a unix socket: take a shorter one"),
        (["up", "DIR/a folder"], "cannot say a path with spaces"),
        (["up", "FULL"], "holds something else. Take a new or an empty folder"),
        (["up", "FULL/file/s"], "Take one that you may write to"),
        (["env", "DIR"], "no cluster here. Start one: slurm/dev_cluster up"),
        (["kill-node", "DIR", "n0"], "no cluster here. Start one"),
    ],
)
def test_bad_input_says_what_to_type_and_makes_nothing(tmp_path_factory: pytest.TempPathFactory, words: list[str], message: str) -> None:
    tmp_path = tmp_path_factory.mktemp("b")  # a short one
    full = tmp_path / "f"
    full.mkdir()
    (full / "file").write_text("mine")
    done = dev_cluster(*(word.replace("DIR", str(tmp_path / "d")).replace("FULL", str(full)) for word in words))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["f", "file"]


def test_bad_input_to_a_cluster_that_is_up(session_cluster: Cluster) -> None:
    folder = session_cluster.folder
    for words, message in (
        (["up", folder], f"a cluster is up here. Use it, or end it first: slurm/dev_cluster down {folder}"),
        (["freeze", folder, "n7"], "no node n7 here; there are n0, n1."),
        (["cut", folder, "n0", "n7"], "no node n7 here"),
        (["exec", folder, "n0"], "exec: the command is missing"),
    ):
        done = dev_cluster(*words)
        assert done.returncode == 1
        assert message in done.stderr
    assert session_cluster.node_states() == {"n0": "idle", "n1": "idle"}


def test_down_of_nothing_is_no_error_and_says_so(tmp_path: Path) -> None:
    done = dev_cluster("down", tmp_path / "none")
    assert (done.returncode, done.stdout) == (0, "")
    assert "no cluster here, nothing to do" in done.stderr


def test_a_start_that_fails_shows_the_logs_and_leaves_nothing(folder: Path) -> None:
    done = dev_cluster("up", folder, "--nodes=1", "--conf=NoSuchKey=1")
    assert done.returncode == 1
    assert "slurmctld ended at the start" in done.stderr
    assert "NoSuchKey" in done.stderr
    assert not traces(folder)
    assert not (folder / "cluster.json").exists()


def test_a_cluster_whose_processes_are_gone_is_cleared_away_by_the_next_up(folder: Path) -> None:
    with cluster_up(folder, "--nodes=1"):
        for pid, _ in json.loads((folder / "cluster.json").read_text())["pids"].values():
            os.kill(pid, 9)
        done = dev_cluster("up", folder, "--nodes=1")
        assert done.returncode == 0, done.stderr


def test_missing_packages_are_named_with_the_line_that_installs_them() -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(PROGRAM).parent)!r})
from cluster import tools
tools.find = lambda name: None if name in ("slurmctld", "munged", "sinfo", "scancel") else "/bin/" + name
tools.check_installed()
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert "no slurmctld, sinfo, scancel, munged." in done.stderr
    assert "apt-get install -y --no-install-recommends slurmctld slurm-client munge\n" in done.stderr


@pytest.mark.parametrize(("variables", "outcome"), [({}, {"skipped": 2}), ({"CI": "true"}, {"errors": 2})])
def test_without_slurm_tests_are_skipped_but_fail_in_ci(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], outcome: dict[str, int]
) -> None:
    monkeypatch.setattr(clusters, "lack", lambda: "apt-get install slurmctld")
    monkeypatch.delenv("CI", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    pytester.makepyfile("import pytest\ndef test_a(cluster): pass\n@pytest.mark.slurm\ndef test_b(): pass\n")
    result = pytester.runpytest_inprocess("-p", "clusters", "-rs")
    result.assert_outcomes(**outcome)
    result.stdout.fnmatch_lines(["*apt-get install slurmctld*"])


@is_root
@pytest.mark.parametrize("has_network", [False, True])
def test_an_ordinary_user_has_clusters_too(has_network: bool) -> None:
    """Without namespaces, or within `unshare` with namespaces. From a copy: the user may be unable to read this checkout or its Python."""
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    own_network = ["unshare", "--user", "--map-current-user", "--keep-caps", "--net", "--mount"]
    if python is None or subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip("no Python 3.11 for other users here")
    if has_network and subprocess.run([*user, *own_network, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces for ordinary users here")
    with tempfile.TemporaryDirectory(prefix="user-") as name:
        copy = Path(name) / "slurm"
        shutil.copytree(Path(PROGRAM).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
        subprocess.run(["chmod", "-R", "a+rX", name], check=True)
        os.chown(name, NOBODY, NOBODY)
        script = f"""
            set -e
            cluster() {{ {python} -B {copy}/dev_cluster "$@"; }}
            {"PATH=$PATH:/usr/sbin:/sbin; ip link set lo up" if has_network else ""}
            trap 'cluster down {name}/c' EXIT
            cluster up {name}/c --gpus 2 {"--netns" if has_network else ""}
            eval "$(cluster env {name}/c)"
            srun --nodes=2 --gpus-per-node=1 bash -c 'echo $(id -u) $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES {"$(hostname)" if has_network else ""}'
            cluster kill-node {name}/c n1
        """
        done = subprocess.run(
            [*user, *(own_network if has_network else []), "bash", "-c", script], text=True, capture_output=True, timeout=60, cwd="/"
        )
        assert done.returncode == 0, done.stderr
        wanted = [f"{NOBODY} {node} 0{f' {node}' if has_network else ''}" for node in ("n0", "n1")]
        assert sorted(done.stdout.splitlines()) == wanted, done.stderr
        assert not traces(Path(name))
