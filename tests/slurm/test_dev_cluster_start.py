"""Where `slurm/dev_cluster` starts, for whom, and what it says to bad input."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import clusters
import pytest
from clusters import PROGRAM, Cluster, cluster_up, dev_cluster, traces

pytestmark = pytest.mark.slurm
NOBODY = 65534


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["up", "DIR", "--nodes=0", "--gpus=-1", "--prefix=N 0"],
            "--nodes 0: expected 1 to 250; --gpus -1: expected 0 or more; --prefix 'N 0'",
        ),
        (
            ["up", "DIR/" + "long" * 25],
            "characters too long for the path of a unix socket: take a shorter one",
        ),
        (["up", "DIR/a folder"], "cannot say a path with spaces"),
        (["up", "FULL"], "holds something else. Take a new or an empty folder"),
        (["up", "FULL/file/s"], "Take one that you may write to"),
        (["env", "DIR"], "no cluster here. Start one: slurm/dev_cluster up"),
        (["kill-node", "DIR", "n0"], "no cluster here. Start one"),
    ],
)
def test_bad_input_says_what_to_type_and_makes_nothing(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], message: str
) -> None:
    tmp_path = tmp_path_factory.mktemp("b")  # a short one
    full = tmp_path / "f"
    full.mkdir()
    (full / "file").write_text("mine")
    done = dev_cluster(
        *(word.replace("DIR", str(tmp_path / "d")).replace("FULL", str(full)) for word in words)
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["f", "file"]


def test_bad_input_to_a_cluster_that_is_up(session_cluster: Cluster) -> None:
    folder = session_cluster.folder
    for words, message in (
        (
            ["up", folder],
            f"a cluster is up here. Use it, or end it first: slurm/dev_cluster down {folder}",
        ),
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


def test_a_start_that_fails_shows_the_logs_and_leaves_nothing(cluster_folder: Path) -> None:
    done = dev_cluster("up", cluster_folder, "--nodes=1", "--conf=NoSuchKey=1")
    assert done.returncode == 1
    assert "slurmctld ended at the start" in done.stderr
    assert "NoSuchKey" in done.stderr
    assert not traces(cluster_folder)
    assert not (cluster_folder / "cluster.json").exists()


def test_a_cluster_whose_processes_are_gone_is_cleared_away_by_the_next_up(
    cluster_folder: Path,
) -> None:
    with cluster_up(cluster_folder, "--nodes=1"):
        for pid, _ in json.loads((cluster_folder / "cluster.json").read_text())["pids"].values():
            os.kill(pid, 9)
        done = dev_cluster("up", cluster_folder, "--nodes=1")
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
    assert (
        "apt-get install -y --no-install-recommends slurmctld slurm-client munge\n" in done.stderr
    )


@pytest.mark.parametrize(
    ("variables", "outcome"), [({}, {"skipped": 2}), ({"CI": "true"}, {"errors": 2})]
)
def test_without_slurm_tests_are_skipped_but_fail_in_ci(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    outcome: dict[str, int],
) -> None:
    monkeypatch.setattr(clusters, "lack", lambda: "apt-get install slurmctld")
    monkeypatch.delenv("CI", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    pytester.makepyfile(
        "import pytest\ndef test_a(cluster): pass\n@pytest.mark.slurm\ndef test_b(): pass\n"
    )
    result = pytester.runpytest_inprocess("-p", "clusters", "-rs")
    result.assert_outcomes(**outcome)
    result.stdout.fnmatch_lines(["*apt-get install slurmctld*"])


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("has_network", [False, True])
def test_an_ordinary_user_has_clusters_too(has_network: bool) -> None:
    """Without namespaces, or within `unshare` with namespaces. From a copy: the user may be unable to read this checkout or its Python."""
    python = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    own_network = ["unshare", "--user", "--map-current-user", "--keep-caps", "--net", "--mount"]
    if (
        python is None
        or subprocess.run(
            [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        ).returncode
    ):
        pytest.skip("no Python 3.11 for other users here")
    if (
        has_network
        and subprocess.run([*user, *own_network, "true"], capture_output=True).returncode
    ):
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
            [*user, *(own_network if has_network else []), "bash", "-c", script],
            text=True,
            capture_output=True,
            timeout=60,
            cwd="/",
        )
        assert done.returncode == 0, done.stderr
        wanted = [f"{NOBODY} {node} 0{f' {node}' if has_network else ''}" for node in ("n0", "n1")]
        assert sorted(done.stdout.splitlines()) == wanted, done.stderr
        assert not traces(Path(name))
