"""The test kit: bodies on ranks, values from ranks, equality over ranks, and that nothing of it stays. Reports: test_testing_reports."""

import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from paths import ROOT

from ddp_kit.distributed.process_group import Group
from ddp_kit.testing import (
    RanksError,
    assert_same_on_all_ranks,
    current_group,
    run_ranks,
    start_ranks,
)
from ddp_kit.testing.job import Job
from ddp_kit.testing.pool import Pool

ALONE = """
import os, time
from ddp_kit.testing.job import Job, pack
from ddp_kit.testing.pool import Pool
from ddp_kit.testing.ranks import Ranks
pool = Pool(imports=())
Pool.current.set(pool)
with Ranks(Job(call=pack(time.sleep, 60), world_size=2, has_group=False, deadline_s=60)) as ranks:
    print(pool.process.pid, *ranks.pids, flush=True)
    ranks.wait()
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (
        stat.exists() and b") Z " in stat.read_bytes()
    )  # a zombie is not running; not every init reaps


def wait_until_gone(pids: list[int]) -> None:
    end = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < end, f"still running: {[pid for pid in pids if is_running(pid)]}"
        time.sleep(0.02)


def rank_times_ten(factor: int) -> int:
    return current_group().rank * factor


lives: list[int] = []


def count_lives() -> int:
    lives.append(1)
    return len(lives)


def rank_1_kills_itself() -> None:
    if current_group().rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def leave_a_group() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def sleep_with_child(file: Path) -> None:
    file.write_text(str(subprocess.Popen(["sleep", "60"]).pid))
    time.sleep(60)


# The first three need no server: it imports torch meanwhile.
def test_the_plugin_starts_without_torch_and_under_both_its_names(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    information = pytester.mkdir("installed-1.dist-info")
    (information / "METADATA").write_text("Name: installed\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[pytest11]\nddp_kit = ddp_kit.testing.plugin\n")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{pytester.path}")
    pytester.makepyfile("import sys\ndef test_light(no_leaks): assert 'torch' not in sys.modules")
    pytester.runpytest_subprocess("-p", "ddp_kit.testing.plugin").assert_outcomes(passed=1)
    pytester.makeconftest("pytest_plugins = ['ddp_kit.testing.plugin']")
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_ranks_and_server_end_when_pytest_is_killed() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", ALONE], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    with process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 3
        assert all(map(is_running, pids))
        process.kill()
    wait_until_gone(pids)


def test_one_process_group_is_the_default_group(one_process_group: dist.ProcessGroup) -> None:
    value = torch.ones(2)
    dist.all_reduce(value)
    assert dist.get_world_size(one_process_group) == 1
    assert value.tolist() == [1, 1]


@pytest.mark.ranks(1, 2, 4)
def test_ranks_reduce_over_every_world_size(group: Group) -> None:
    value = torch.tensor([group.rank + 1.0])
    dist.all_reduce(value)
    assert value.item() == group.world_size * (group.world_size + 1) / 2
    assert os.environ["WORLD_SIZE"] == str(group.world_size)
    assert torch.get_num_threads() == 1


@pytest.mark.ranks(2)
@pytest.mark.parametrize("number", [3, 4])
def test_parameters_and_fixtures_reach_the_ranks(
    number: int, tmp_path: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHANGED_AND_PUT_BACK", "1")
    (tmp_path / str(group.rank)).write_text(str(number))
    dist.barrier()
    assert {file.read_text() for file in tmp_path.iterdir()} == {str(number)}


class TestMethods:
    @pytest.mark.ranks(2)
    def test_a_method_runs_on_ranks(self, group: Group) -> None:
        assert group is current_group()


@pytest.mark.ranks(2)
def test_filters_make_warnings_errors_in_ranks() -> None:
    with pytest.raises(UserWarning, match="careful"):
        warnings.warn("careful", stacklevel=1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads what Linux hands out")
def test_ranks_meet_at_a_port_that_the_kernel_gives_to_nobody_else() -> None:
    handed_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(20):
        job = Job(call=b"", world_size=1, has_group=False, deadline_s=1.0)
        assert job.port < handed_out


def test_values_come_back_in_rank_order() -> None:
    assert run_ranks(rank_times_ten, 3, 10) == [0, 10, 20]


def test_no_state_stays_from_one_test_to_the_next() -> None:
    assert run_ranks(count_lives, 1, group=False) + run_ranks(count_lives, 1, group=False) == [1, 1]


def test_a_group_left_behind_is_named() -> None:
    with pytest.raises(RanksError, match=r"leaked process group: .*gloo"):
        run_ranks(leave_a_group, 1, group=False)


@pytest.mark.ranks(3)
def test_same_values_pass_and_the_first_difference_is_named(group: Group) -> None:
    state = {
        "weight": torch.arange(6.0).reshape(2, 3).to(torch.bfloat16),
        "lr": [0.1, float("nan")],
        "names": ("a", None),
        "empty": torch.zeros(0),
    }
    assert_same_on_all_ranks(state)
    state["weight"][1, 2] = 7.0 if group.rank == 1 else 5.0
    with pytest.raises(
        AssertionError,
        match=r"(?s)entry 1.*ranks 0, 2: value\['weight'\] = bfloat16.*at \[1, 2\] 5.0.*rank 1: .* 7.0",
    ):
        assert_same_on_all_ranks(state)
    with pytest.raises(
        AssertionError, match=r"(?s)rank 0: len\(value\) = 2.*ranks 1, 2: len\(value\) = 1"
    ):
        assert_same_on_all_ranks([0] if group.rank else [0, 0])
    with pytest.raises(AssertionError, match=r"value = -0\.0"):
        assert_same_on_all_ranks(-0.0 if group.rank == 2 else 0.0)
    with pytest.raises(AssertionError, match=r"rank 2: value = 2j"):
        assert_same_on_all_ranks(2j if group.rank == 2 else 1j)
    with pytest.raises(AssertionError, match=r"at \[1\] 3.0"):
        assert_same_on_all_ranks(torch.tensor([0.0, 3.0 if group.rank == 2 else 1.0]))


def test_a_server_that_dies_before_it_has_read_everything_is_named() -> None:
    """Its end of the connection is then reset, not closed."""
    dead = Pool()
    dead.connection, theirs = socket.socketpair()
    dead.buffer, dead.log = b"", Path("no-log")
    with dead.connection:
        dead.connection.sendall(b"unread")
        theirs.close()
        with pytest.raises(RuntimeError, match="the server of ranks has ended"):
            dead.receive(1)


def test_a_killed_rank_is_the_culprit_and_named_with_its_signal() -> None:
    with pytest.raises(RanksError, match="Rank 1 of 2 failed first: killed by SIGKILL") as caught:
        run_ranks(rank_1_kills_itself, 2)
    assert caught.value.culprit == 1
    assert [report.exit_code for report in caught.value.reports] == [1, -signal.SIGKILL]


def test_ranks_can_be_killed_from_outside_and_their_children_go_too(tmp_path: Path) -> None:
    child = tmp_path / "child"
    with start_ranks(sleep_with_child, 1, child, group=False) as ranks:
        while not child.exists() or not child.read_text():
            time.sleep(0.01)
        ranks.kill(0)
        (report,) = ranks.wait()
    assert (report.outcome, report.exit_code) == ("died", -signal.SIGKILL)
    wait_until_gone([*ranks.pids, int(child.read_text())])
