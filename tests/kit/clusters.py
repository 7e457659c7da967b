"""A real SLURM for tests, started by `slurm/dev_cluster`: the marker `slurm` and the fixture `cluster`.

A test marked `slurm`, or one that takes `cluster`, is skipped where SLURM is not installed, and fails instead where `CI` is set. All tests
of a session share one cluster of 2 nodes with 8 CPUs and 4 fake GPUs each; after each test nothing may be left on it.
"""

import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from paths import ROOT

PROGRAM = str(ROOT / "slurm" / "dev_cluster")
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "DEADLINE",
    "OUT_OF_MEMORY",
)  # a job that is requeued is in none of these
FOREIGN = (
    "SLURM",
    "SBATCH_",
    "SRUN_",
    "SALLOC_",
)  # of a cluster or a job that pytest itself may run in
POLL_S = 0.05
LEFT_S = 15  # for what a test has cancelled to end: KillWait, and a tick of the scheduler


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster that is up in a folder."""

    folder: Path

    @property
    def environ(self) -> dict[str, str]:
        """An environment whose sbatch, srun, squeue, ... talk to this cluster."""
        own = {
            "SLURM_CONF": str(self.folder / "etc" / "slurm.conf"),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
        }
        return {
            name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)
        } | own

    def enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The test's own process talks to this cluster from here on."""
        for name in os.environ.keys() - self.environ.keys():
            monkeypatch.delenv(name)
        for name in ("SLURM_CONF", "PATH"):
            monkeypatch.setenv(name, self.environ[name])

    def run(self, *command: str, within_s: float = 30, **variables: str) -> str:
        """Returns a command's output. Fails the test if it fails or takes longer."""
        done = self.tried(*command, within_s=within_s, **variables)
        assert done.returncode == 0, (
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout

    def tried(
        self, *command: str, within_s: float = 30, **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        """Returns how a command ended, which may be badly."""
        return subprocess.run(
            command,
            env=self.environ | variables,
            text=True,
            capture_output=True,
            timeout=within_s,
            cwd=self.folder,
        )

    def control(self, verb: str, *words: str) -> str:
        """Does something to the cluster: `cluster.control("kill-node", "n1")`. Returns what was printed."""
        return self.run(sys.executable, PROGRAM, verb, str(self.folder), *words)

    def submit(self, *words: str, **variables: str) -> str:
        """Returns the id of a job: `cluster.submit("--nodes=2", "--wrap=hostname")`."""
        return self.run("sbatch", "--parsable", *words, **variables).strip().partition(";")[0]

    def state(self, job: str) -> str:
        """Returns a job's state: PENDING, RUNNING, COMPLETED, ...; for an array, all that its elements are in."""
        found = self.run(
            "squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"
        ).split()
        return " ".join(sorted(set(found)))

    def facts(self, job: str) -> dict[str, str]:
        """Returns what SLURM knows of a job: JobState, Restarts, NodeList, Reason, ExitCode, ..."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *, state: str, within_s: float = 20) -> None:
        """Waits for a state (of all elements of an array). Fails the test after `within_s` seconds, or at once when the job has ended otherwise."""
        end = time.monotonic() + within_s
        while (found := self.state(job)) != state:
            assert not set(found.split()) & set(ENDED) - set(state.split()), (
                f"job {job} ended as {found}, not {state}. {self.story(job)}"
            )
            assert time.monotonic() < end, (
                f"job {job} is {found} after {within_s} s, not {state}. {self.story(job)}"
            )
            time.sleep(POLL_S)

    def story(self, job: str) -> str:
        """Returns what is known of a job for an error message: SLURM's reasons, and the end of its output."""
        facts = self.facts(job)
        known = ", ".join(
            f"{name}={facts.get(name)}"
            for name in ("Reason", "ExitCode", "Restarts", "NodeList", "ReqNodeList", "StartTime")
        )
        with contextlib.suppress(OSError):
            known += "\n" + Path(facts["StdOut"]).read_text(errors="replace")[-2000:]
        return known

    def wait_node(self, node: str, *, state: str, within_s: float = 20) -> None:
        """Waits until a node is in a state as sinfo has it: idle, down, mix, ..."""
        end = time.monotonic() + within_s
        while (found := self.node_states()[node]) != state:
            assert time.monotonic() < end, f"{node} is {found} after {within_s} s, not {state}"
            time.sleep(POLL_S)

    def node_states(self) -> dict[str, str]:
        """Returns each node's state, with sinfo's `*` for one that does not answer."""
        lines = self.run(
            "sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T"
        ).splitlines()
        return dict(line.split() for line in lines)

    def left(self, *, within_s: float = LEFT_S) -> list[str]:
        """Returns a line for each job, node that is not idle, and process of a job that is still there after `within_s` seconds."""
        end = time.monotonic() + within_s
        while found := self._left_now():
            if time.monotonic() > end:
                break
            time.sleep(POLL_S)
        return found

    def _left_now(self) -> list[str]:
        jobs = self.run("squeue", "--noheader", "--format=job %i (%j) is %T").splitlines()
        nodes = [
            f"node {node} is {state}"
            for node, state in self.node_states().items()
            if state != "idle"
        ]
        return [*jobs, *nodes] or [
            f"process left on {line}" for line in self.control("ps").splitlines()
        ]

    def restart(self) -> None:
        """Whatever has happened to it: an empty cluster again."""
        up = self.folder / "up.txt"
        words = up.read_text().split("\n")
        self.control("down")
        self.control("up", *words)


@contextlib.contextmanager
def cluster_up(folder: Path, *words: str) -> Iterator[Cluster]:
    """A cluster of the test's own, with the flags of `dev_cluster up`; down at the end, also if pytest is killed."""
    cluster = Cluster(folder=folder)
    folder.mkdir(parents=True, exist_ok=True)
    cluster.control("up", *words)
    (folder / "up.txt").write_text("\n".join(words))
    with subprocess.Popen(
        [sys.executable, PROGRAM, "down", str(folder), "--after", str(os.getpid())],
        start_new_session=True,
    ) as guard:
        try:
            yield cluster
        finally:
            guard.terminate()
            cluster.control("down")


def dev_cluster(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    """Runs the program, which may fail."""
    return subprocess.run(
        [sys.executable, PROGRAM, *map(str, words)], text=True, capture_output=True, timeout=60
    )


def traces(folder: Path) -> list[str]:
    """Returns the living processes whose command, environment or working directory knows a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            known = (
                (process / "cmdline").read_bytes()
                + (process / "environ").read_bytes()
                + os.fsencode((process / "cwd").readlink())
            )
        except OSError:
            continue
        is_watching = b"--after" in known or int(process.name) == os.getpid()
        if os.fsencode(folder) in known and not is_watching:
            found.append(f"{process.name}: {known[:200]!r}")
    return found


def becomes(is_so: Callable[[], bool], *, within_s: float) -> bool:
    """Whether it is so within some seconds."""
    end = time.monotonic() + within_s
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True


@functools.cache
def lack() -> str:
    """Returns what to install before tests can have a SLURM, "" for nothing."""
    return subprocess.run(
        [sys.executable, PROGRAM, "check"], text=True, capture_output=True, timeout=10
    ).stderr.strip()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whoever takes `cluster` is marked `slurm`."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("slurm")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests that need a SLURM where there is none, but never in CI."""
    if item.get_closest_marker("slurm") is None or not lack():
        return
    if os.environ.get("CI"):
        pytest.fail(f"CI is set, and a test that needs SLURM cannot run. {lack()}", pytrace=False)
    pytest.skip(lack())


@pytest.fixture
def cluster_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for a cluster of the test's own, with a short path."""
    made = tmp_path_factory.mktemp("c") / "d"
    yield made
    dev_cluster("down", made)


@pytest.fixture(scope="session")
def session_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The session's cluster, without the check after each test."""
    with cluster_up(
        tmp_path_factory.mktemp("slurm"), "--nodes=2", "--cpus=8", "--gpus=4"
    ) as cluster:
        yield cluster


@pytest.fixture
def cluster(session_cluster: Cluster) -> Iterator[Cluster]:
    """The session's cluster, idle. A test that leaves a job, a process of one, or a node that is not idle fails; the next one has a new cluster."""
    yield session_cluster
    found = session_cluster.left()
    if found:
        session_cluster.restart()
        pytest.fail("left on the cluster:\n" + "\n".join(found), pytrace=False)
