"""`ddp-kit doctor`: a healthy place is a go, and each fault is found, with its rank, by a line of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from clusters import Cluster
from examined import examine

from ddp_kit.cli.doctor import judged_limits, judged_ranks, judged_together
from ddp_kit.cli.doctor.network import partners
from ddp_kit.cli.main import main
from ddp_kit.io.listening import listening

ALONE = [
    "ranks",
    "answers",
    "versions",
    "variables",
    "devices",
    "threads",
    "open files",
    "processes",
    "shared memory",
    "product",
    "disk",
    "room",
    "shared disk",
    "grace",
]
TOGETHER = ["clocks", "pairs", "sum", "addresses"]
GIB = 2**30


@pytest.fixture(autouse=True)
def folder_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A doctor tries the disk where it stands, and tests beside these stand where they were started."""
    monkeypatch.chdir(tmp_path_factory.mktemp("place"))


def alone(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    """A doctor in one process. Returns its exit code and its checks by name."""
    code = main(["doctor", "--json", *words])
    found = json.loads(capsys.readouterr().out)
    assert found["go"] == (code == 0)
    return code, {check["name"]: check for check in found["checks"]}


def test_one_process_of_a_healthy_place_is_a_go_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, checks = alone(capsys, "--run-dir", str(tmp_path / "runs" / "a"))
    assert (code, list(checks)) == (0, [*ALONE, "addresses"])
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) in checks["disk"]["figure"]
    assert main(["doctor", "--run-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "go"
    assert [line.split("  ")[0] for line in lines[:-1]] == [
        check["verdict"] if check["verdict"] != "ok" else "ok" for check in checks.values()
    ]


def test_two_healthy_ranks_are_a_go(tmp_path: Path) -> None:
    found = examine("--run-dir", str(tmp_path), "--checkpoint-gib", "0.001")
    assert found.failed == [], found.checks
    assert (found.codes, found.is_go) == ([0, 0], True)
    assert list(found.checks) == [*ALONE, *TOGETHER]
    assert "2 ranks on 1 node" in found.figure("ranks")
    assert "rank=0 (RANK)" in found.figure("ranks")
    assert "right to the bit" in found.figure("sum")
    assert "ranks 0 and 1" in found.figure("pairs")
    assert "this host alone" in found.figure("addresses")
    assert "3 kept, the best and a new one of 1 MiB" in found.figure("room")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "name", "words"),
    [
        ("other_version", "versions", "9.9.9 on rank 1"),
        ("few_files", "open files", "on rank 1 64 may be open"),
        ("wrong_chip", "product", "a repeated product has other bits on rank 1"),
        ("wrong_sum", "sum", "a sum over all ranks is wrong on rank 1"),
    ],
)
def test_a_fault_of_one_rank_is_a_no_go_on_all_and_names_it(
    fault: str, name: str, words: str
) -> None:
    found = examine(rank_1=fault)
    assert words in found.figure(name), found.checks
    assert found.failed == [name]
    assert found.checks[name]["advice"]
    assert (found.codes, found.is_go) == ([1, 1], False)


def test_a_rank_that_never_comes_is_named_and_nobody_waits_longer() -> None:
    found = examine("--within-s", "2", world_size=3, rank_1="never_comes")
    assert found.figure("answers") == "rank 1 did not answer within 2 s"
    assert found.codes == [1, 1]
    # what those that are here found out is told all the same
    assert found.verdict("versions") == "ok"
    assert "sum" not in found.checks


def test_a_rank_that_stops_in_the_middle_is_named() -> None:
    found = examine("--within-s", "2", rank_1="stops")
    assert found.codes == [1]
    assert "rank 1 did not answer" in found.figure("sum")
    assert found.verdict("pairs") == "ok", found.checks


def test_ranks_without_rank_0_leave_too() -> None:
    found = examine("--within-s", "2", rank_0="never_comes")
    assert found.codes == [1]


def test_a_rank_that_is_stuck_in_a_system_call_says_where_and_leaves() -> None:
    found = examine("--within-s", "1", rank_0="hangs")
    assert found.figure("end") == "rank 0 is stuck in: disk"
    assert found.codes == [1, 1]


def test_a_clock_that_is_an_hour_off_is_found_through_the_store() -> None:
    found = examine(all="own_node", rank_1="wrong_clock")
    assert "2 ranks on 2 nodes" in found.figure("ranks")
    assert found.verdict("clocks") == "FAIL"
    assert "+3.6e+03 s from rank 0's clock" in found.figure("clocks")
    assert found.failed == ["clocks"]
    assert found.codes == [1, 1]


def test_half_set_rank_variables_are_a_no_go(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    code, checks = alone(capsys)
    assert code == 1
    assert "the rank variables are half set. Found RANK=0" in checks["ranks"]["figure"]


def test_room_and_grace_are_judged_by_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DDP_KIT_GRACE_S", "30")
    (tmp_path / "settings.json").write_text(json.dumps({"settings": {"keep": 5}}))
    event = {"event": "grace", "step": 8, "message": "a stop needs up to 45.5 s: step 0.2 s, ..."}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    folder = tmp_path / "checkpoints" / "step-00000008"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_bytes(bytes(3 * 2**20))
    code, checks = alone(capsys, "--run-dir", str(tmp_path))
    assert checks["room"]["figure"].endswith("5 kept, the best and a new one of 3 MiB")
    assert checks["grace"]["verdict"] == "FAIL"
    assert "DDP_KIT_GRACE_S gives 30 s; a stop was measured to need 45.5 s" in str(checks["grace"])
    code, checks = alone(capsys, "--run-dir", str(tmp_path), "--checkpoint-gib", "1e7")
    assert (code, checks["room"]["verdict"]) == (1, "FAIL")


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 1 MB, full but for little. Skips the test where none can be mounted."""
    home = folder / "small"
    home.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(home)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here, it takes root: {done.stderr.strip()}")
    try:
        yield home
    finally:
        subprocess.run(["umount", str(home)], check=True)


def test_a_full_disk_is_a_no_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path) as home:
        (home / "other").write_bytes(bytes(700_000))
        code, checks = alone(capsys, "--run-dir", str(home / "run"))
        assert code == 1
        assert checks["disk"]["verdict"] == "FAIL"
        assert "rank 0: No space left on device" in checks["disk"]["figure"]
        assert [path.name for path in home.iterdir()] == ["other"]


def facts_of(*ranks: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Facts of ranks on one node, but for what is stated."""
    found = {}
    for rank, own in enumerate(ranks):
        limits = {"shared_free": 64 * GIB, "shared_size": 64 * GIB, "processes": None}
        usual = {"host": "n0", "device": "cpu", "visible": 0, "cores": 8.0, "threads": 2}
        node = own.pop("node", 0)
        limits |= own.pop("limits", {})
        topology = {"node_rank": node, "world_size": len(ranks)}
        found[rank] = {**usual, "topology": topology, "limits": limits, **own}
    return found


def test_what_a_machine_of_its_own_would_show_is_judged_alike() -> None:
    crowded = judged_ranks.threads_line(facts_of({"threads": 6}, {"threads": 6}))
    assert (crowded.verdict, crowded.figure) == ("warn", "n0: 12 threads of 2 ranks on 8 cores")
    small = {"shared_free": 40 * 2**20, "shared_size": 64 * 2**20}
    assert judged_limits.shared_memory_line(facts_of({"limits": small})).verdict == "warn"
    gpu = {"device": "cuda a", "limits": small}
    assert judged_limits.shared_memory_line(facts_of(gpu, {"device": "cuda b"})).verdict == "FAIL"
    same = judged_ranks.devices_line(facts_of({"device": "cuda a"}, {"device": "cuda a"}))
    assert (same.verdict, "1 CUDA devices for 2 ranks" in same.figure) == ("FAIL", True)
    idle = judged_ranks.devices_line(facts_of({"device": "cuda a", "visible": 8}))
    assert (idle.verdict, "8 GPUs for 1 rank" in idle.figure) == ("warn", True)
    few = judged_limits.processes_line(facts_of({}, {"limits": {"processes": 20}}))
    assert (few.verdict, few.figure.startswith("on rank 1 20 may still")) == ("FAIL", True)


def test_the_slowest_pair_is_named_against_the_fastest_of_its_kind() -> None:
    facts = facts_of({}, {}, {"node": 1, "host": "n1"}, {"node": 1, "host": "n1"})
    rates = {(0, 1): 2e9, (2, 3): 1.9e9, (0, 2): 1e9, (1, 3): 2e8, (0, 3): 1e9, (1, 2): 9e8}
    told: dict[int, dict[str, Any]] = {}
    for rank in facts:
        own = {str(sum(pair) - rank): rate for pair, rate in rates.items() if rank in pair}
        told[rank] = {"pairs": own}
    line = judged_together.pairs_line(told, facts)
    assert line.verdict == "warn"
    words = "between nodes the slowest is ranks 1 (n0) and 3 (n1), 200 MB/s; the fastest"
    assert words in line.figure
    assert "on a node the slowest is ranks 2 and 3, 1900 MB/s" in line.figure
    told[1]["pairs"]["3"] = 1e5
    assert judged_together.pairs_line(told, facts).verdict == "FAIL"


@pytest.mark.parametrize("world_size", [2, 3, 4, 7, 8, 40])
def test_in_each_round_partners_are_each_others(world_size: int) -> None:
    rounds = [partners(rank, world_size) for rank in range(world_size)]
    seen = set()
    for turn in range(len(rounds[0])):
        for rank in range(world_size):
            other = rounds[rank][turn]
            assert other != rank
            if other >= 0:
                assert rounds[other][turn] == rank
                seen.add((min(rank, other), max(rank, other)))
    if world_size <= 8:
        assert len(seen) == world_size * (world_size - 1) // 2
    assert len(rounds[0]) <= 8


def test_listening_addresses_are_read_from_the_kernels_tables(tmp_path: Path) -> None:
    folder = tmp_path / "9"
    (folder / "fd").mkdir(parents=True)
    (folder / "net").mkdir()
    (folder / "fd" / "3").symlink_to("socket:[77]")
    (folder / "fd" / "4").symlink_to("socket:[78]")
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    rest = "00000000:00000000 00:00000000 00000000     0        0"
    (folder / "net" / "tcp").write_text(
        f"{head}   0: 0100007F:7338 00000000:0000 0A {rest} 77 1\n"
        f"   1: 00000000:0016 00000000:0000 0A {rest} 99 1\n"
        f"   2: 0100007F:7338 0100007F:0016 01 {rest} 78 1\n"
    )
    any_6 = "0" * 32
    (folder / "net" / "tcp6").write_text(f"{head}   0: {any_6}:7339 {any_6}:0000 0A {rest} 78 1\n")
    assert listening("9", proc=tmp_path) == ["127.0.0.1:29496", "[::]:29497"]


def started(*words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    given = os.environ | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        [sys.executable, *words], env=given, text=True, capture_output=True, timeout=100
    )


@pytest.mark.slow
@pytest.mark.steady
@pytest.mark.parametrize(
    ("words", "launcher"),
    [
        (["-m", "ddp_kit.cli.main", "doctor", "--nproc-per-node", "2"], "ddp-kit run"),
        (
            [
                *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
                *("-m", "ddp_kit.cli.main", "doctor"),
            ],
            "torchrun",
        ),
    ],
)
def test_it_starts_as_a_run_does(words: list[str], launcher: str) -> None:
    done = started(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"2 ranks on 1 node by {launcher}" in done.stdout
    assert done.stdout.splitlines()[-1] == "go"
    store = "other hosts reach [::]:" if launcher == "torchrun" else "this host alone"
    assert store in done.stdout


@pytest.mark.slow
@pytest.mark.steady
def test_under_srun_the_nodes_of_a_job_are_examined(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.tried(
        *("srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "ddp_kit.cli.main"),
        *("doctor", "--run-dir", str(tmp_path)),
        within_s=100,
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks on 2 nodes by slurm: rank=0 (SLURM_PROCID)" in done.stdout
    assert "s from rank 0's clock (within " in done.stdout
    assert "between nodes ranks 0 " in done.stdout
    assert done.stdout.splitlines()[-1] == "go"


@contextmanager
def slow_link(rate: str) -> Iterator[list[list[str]]]:
    """Two network namespaces with a wire of a rate between them. Yields what comes before a command in each. Skips the test where there are none."""
    names = [f"ddp{os.getpid()}{side}" for side in "ab"]

    def network(*words: str) -> None:
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(
                f"network namespaces cannot be made here, it takes root: {done.stderr.strip()}"
            )

    made = []
    try:
        for name in names:
            network("ip", "netns", "add", name)
            made.append(name)
        network(
            *("ip", "link", "add", "wire", "netns", names[0], "type", "veth", "peer"),
            *("name", "wire", "netns", names[1]),
        )
        for number, name in enumerate(names, start=1):
            inside = ["ip", "-n", name]
            network(*inside, "addr", "add", f"10.77.0.{number}/24", "dev", "wire")
            network(*inside, "link", "set", "wire", "up")
            network(*inside, "link", "set", "lo", "up")
            shaping = ["tc", "-n", name, "qdisc", "add", "dev", "wire", "root", "tbf"]
            network(*shaping, "rate", rate, "burst", "16kb", "latency", "400ms")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.slow
@pytest.mark.steady
def test_a_network_of_a_megabit_is_a_no_go_and_its_pair_is_named() -> None:
    with slow_link("1mbit") as places:
        ranks = []
        for rank, place in enumerate(places):
            env = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "10.77.0.1",
                "MASTER_PORT": "29511",
                "GLOO_SOCKET_IFNAME": "wire",
                "OMP_NUM_THREADS": "1",
            }
            words = [*place, sys.executable, "-m", "ddp_kit.cli.main", "doctor", "--json"]
            ranks.append(
                subprocess.Popen(
                    words, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            )
        output = [rank.communicate(timeout=100)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], output
    found = json.loads(output[0][output[0].index("{") :])
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["pairs"]["verdict"] == "FAIL", checks
    assert "between nodes ranks 0 and 1, 0." in checks["pairs"]["figure"]
    assert checks["sum"]["verdict"] == "ok"
