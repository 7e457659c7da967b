"""Memory that is used up: a process that the kernel kills for it is told apart from any other one that was killed, and so are the words of libraries."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from caged import CAGE, memory_cage
from paths import KIT
from warm import LAUNCHER, started

from ddp_kit.distributed.out_of_memory import is_out_of_memory
from ddp_kit.io.cgroup import MemoryKills, own_cgroup

HUNGRY = str(KIT / "hungry.py")
MIB = 2**20
LIMIT = 512 * MIB
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2_MOUNT = "41 31 0:38 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n"


def words(recipe: str, folder: Path) -> list[str]:
    return ["--nproc-per-node", "2", recipe, "--run-dir", str(folder / "run")]


def status(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "run" / "status.json").read_text())
    return found


@pytest.mark.parametrize("eater", ["1:3", "0:3"])
def test_a_rank_that_the_kernel_kills_for_memory_is_named_with_the_numbers(
    eater: str, tmp_path: Path
) -> None:
    with memory_cage(LIMIT) as cage:
        env = {CAGE: str(cage), "EATER": eater}
        with started("caged", *words(HUNGRY, tmp_path), folder=tmp_path, env=env) as run:
            assert run.ended() == 128 + signal.SIGKILL
        killed = f"rank {eater[0]} was killed by the kernel: out of memory (cgroup "
        numbers = "512 MiB limit, 512 MiB at the peak, 1 oom_kill)"
        own = [line for line in run.output.splitlines() if line.startswith(killed)]
        assert len(own) == 1, run.output
        assert own[0].endswith(numbers)
        assert cage.name in own[0]
        assert "was ended by SIGKILL" not in run.output
        assert "a peer is gone that left no word" not in run.output
    left = status(tmp_path)
    assert left["status"] == "failed"
    assert str(left["reason"]).startswith(killed), left
    assert numbers in str(left["reason"])


def test_a_rank_that_was_killed_otherwise_is_not_said_to_be_out_of_memory(tmp_path: Path) -> None:
    faulty = [str(KIT / "faulty.py"), "--fault", "SIGKILL", "--at-rank", "1"]
    given = ["--nproc-per-node", "2", *faulty, "--run-dir", str(tmp_path / "run")]
    with started(LAUNCHER, *given, folder=tmp_path) as run:
        assert run.ended() == 128 + signal.SIGKILL
    assert "rank 1 was ended by SIGKILL" in run.output
    assert "the kernel" not in run.output
    assert "the kernel" not in str(status(tmp_path)["reason"])


@pytest.mark.slow
@pytest.mark.steady
def test_a_loader_worker_that_the_kernel_kills_for_memory_is_named_so(tmp_path: Path) -> None:
    with memory_cage(LIMIT) as cage:
        env = {CAGE: str(cage), "EATER": "worker"}
        given = [*words(HUNGRY, tmp_path), "--num-workers", "1"]
        with started("caged", *given, folder=tmp_path, env=env) as run:
            assert run.ended() == 1
    reason = str(status(tmp_path)["reason"])
    assert reason.startswith("rank 1: RuntimeError: DataLoader worker (pid"), reason
    assert "; killed by the kernel: out of memory (cgroup " in reason


def tree(root: Path, *, path: str, mount: str, line: str) -> Path:
    """A system's files as one process sees them. Returns the folder of its cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(line + path + "\n")
    (root / "proc/self/mountinfo").write_text(mount)
    folder = root / mount.split()[4].lstrip("/") / path.lstrip("/")
    folder.mkdir(parents=True)
    return folder


def test_in_a_job_of_slurm_the_kills_of_all_its_tasks_on_the_node_count(tmp_path: Path) -> None:
    job = "/slurm/uid_0/job_17"
    first = tree(tmp_path / "1", path=f"{job}/step_0/task_0", mount=V1_MOUNT, line="4:memory:")
    home = tmp_path / "1/sys/fs/cgroup/memory"
    other = first.with_name("task_1")
    foreign = home / "slurm/uid_0/job_18/step_0/task_0"
    for folder in (first, other, foreign):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.oom_control").write_text("oom_kill_disable 0\noom_kill 2\n")
        (folder / "memory.limit_in_bytes").write_text("9223372036854771712")
        (folder / "memory.max_usage_in_bytes").write_text(str(700 * MIB))
    (first.parent / "memory.limit_in_bytes").write_text(str(3 * 1024 * MIB))
    memory = MemoryKills(root=tmp_path / "1")
    (foreign / "memory.oom_control").write_text("oom_kill 3\n")
    assert memory.words() == ""
    (other / "memory.oom_control").write_text("oom_kill 3\n")
    assert memory.words() == (
        f"out of memory (cgroup {job}/step_0/task_0: 3.0 GiB limit, 700 MiB at the peak, 1 oom_kill)"
    )


def test_version_2_counts_a_kill_in_the_cgroups_above(tmp_path: Path) -> None:
    path = "/system.slice/slurmstepd.scope/job_17/step_0/user/task_0"
    own = tree(tmp_path, path=path, mount=V2_MOUNT, line="0::")
    (own / "cgroup.controllers").write_text("cpu memory pids\n")
    (own / "memory.max").write_text("max\n")
    job = own.parents[2]
    (job / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 1\noom_kill 0\n")
    memory = MemoryKills(root=tmp_path)
    (job / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 2\noom_kill 2\n")
    assert memory.words() == f"out of memory (cgroup {path}: 2 oom_kill)"


def test_a_container_sees_its_own_part_of_the_tree(tmp_path: Path) -> None:
    mount = V1_MOUNT.replace("0:32 /", "0:32 /docker/abc")
    own = tree(tmp_path, path="/docker/abc/inner", mount=mount, line="4:memory:")
    inner = tmp_path / "sys/fs/cgroup/memory/inner"
    inner.mkdir()
    found = own_cgroup("memory", root=tmp_path)
    assert found is not None
    assert (found.folder, own == inner) == (inner, False)


def test_without_cgroups_nothing_is_said(tmp_path: Path) -> None:
    assert MemoryKills(root=tmp_path).words() == ""


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ...", 2),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(...)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ..."),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        torch.distributed.DistBackendError(
            "NCCL error: unhandled cuda error ... Last error:\nCuda failure 2 'out of memory'"
        ),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        OSError(12, os.strerror(12)),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:40] or type(error).__name__,
)
def test_memory_that_is_used_up_is_known_by_all_its_words(error: BaseException) -> None:
    assert is_out_of_memory(error)
    outer = RuntimeError("the forward pass failed")
    outer.__cause__ = error
    assert is_out_of_memory(outer)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUDA error: device-side assert triggered"),
        ValueError("the word out of memory in an error of the recipe's own"),
        OSError(28, "No space left on device"),
        torch.distributed.DistNetworkError("Connection reset by peer"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_other_errors_are_not_taken_for_it(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_the_systems_own_words_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
