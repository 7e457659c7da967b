"""The run directory: one live owner, whole files, names that do not collide."""

import dataclasses
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from ddp_kit.errors import ConfigError
from ddp_kit.io.process import process_start
from ddp_kit.lifecycle import run_dir as module
from ddp_kit.lifecycle.run_dir import Owner, RunDir, is_in_use
from ddp_kit.lifecycle.start import default_name
from ddp_kit.testing import start_ranks

RACERS = 8


@dataclasses.dataclass(frozen=True)
class Others:
    """Other processes: one holds `idle`, one holds `writing` and rewrites its status, eight each raced for `free` and `stale`."""

    root: Path
    idle: int
    writing: int
    winners: list[int]


def hold(path: Path) -> None:
    RunDir(path).claim()
    while True:
        time.sleep(1)


def hold_and_write(path: Path) -> None:
    run = RunDir(path)
    run.claim()
    metrics = {f"m{index}": 0.5 for index in range(500)}
    while True:
        run.status("running", step=7, epoch=1, metrics=metrics)


def race(path: Path, begin: float) -> None:
    """Tries to claim it at that moment, says whether that went well, and stays until all have tried."""
    run = RunDir(path)
    said = path.with_name(f"{path.name}-{os.getpid()}")
    while time.monotonic() < begin:
        pass
    try:
        run.claim()
        said.write_text("won")
    except ConfigError:
        said.write_text("lost")
    while len(list(path.parent.glob(f"{path.name}-*"))) < RACERS:
        time.sleep(0.02)


def fork(function, *arguments):
    child = os.fork()
    if child == 0:
        function(*arguments)
        os._exit(0)
    return child


def start_others(root: Path) -> None:
    """Starts them, and leaves their process ids in a file."""
    pids = [fork(hold, root / "idle"), fork(hold_and_write, root / "writing")]
    begin = time.monotonic() + 0.2
    racers = [fork(race, root / name, begin) for name in ("free", "stale") for _ in range(RACERS)]
    for racer in racers:
        os.waitpid(racer, 0)
    (root / "pids.tmp").write_text(json.dumps(pids))
    (root / "pids.tmp").replace(root / "pids")
    while True:
        time.sleep(1)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_lock(root / "stale", start="another life of this pid")
    with start_ranks(start_others, 1, root, group=False, deadline_s=600) as ranks:
        until = time.monotonic() + 60
        while not (root / "pids").exists() and time.monotonic() < until:
            ranks.pool.receive(0.02)
        idle, writing = json.loads((root / "pids").read_text())
        while not ((root / "idle/run.lock").exists() and (root / "writing/status.json").exists()):
            assert time.monotonic() < until
            time.sleep(0.02)
        winners = []
        for name in ("free", "stale"):
            said = [path.read_text() for path in root.glob(f"{name}-*")]
            winners.append(said.count("won"))
        yield Others(root, idle, writing, winners)


def kill(pid: int) -> None:
    """Kills a process without warning and waits until it runs no more; nobody reaps it, and a zombie holds nothing."""
    os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while process_start(pid) and time.monotonic() < until:
        time.sleep(0.01)


def write_lock(path: Path, **changes: object) -> None:
    """Writes the lock this process would write, with changes."""
    path.mkdir(exist_ok=True)
    (path / "run.lock").write_text(
        json.dumps({**dataclasses.asdict(module._this_process()), **changes})
    )


def owner_after_claim(path: Path) -> tuple[int, str]:
    """Claims a directory and leaves it again. Returns the pid and start that its lock held in between."""
    run = RunDir(path)
    run.claim()
    lock = json.loads((path / "run.lock").read_text())
    run.release()
    return lock["pid"], lock["start"]


def test_claim_makes_the_directory_and_release_leaves_no_lock_and_no_thread(tmp_path):
    run = RunDir(tmp_path / "a" / "b")
    run.claim()
    lock = json.loads((run.path / "run.lock").read_text())
    assert (lock["host"], lock["pid"], lock["start"]) == (
        socket.gethostname(),
        os.getpid(),
        process_start(os.getpid()),
    )
    assert is_in_use(run.path)
    assert any(thread.name == "run-dir-heartbeat" for thread in threading.enumerate())
    run.release()
    run.release()
    assert not any(thread.name == "run-dir-heartbeat" for thread in threading.enumerate())
    assert list(run.path.iterdir()) == []
    run.claim()
    run.release()


def test_a_live_owner_is_named_and_a_killed_one_makes_room(others):
    path = others.root / "idle"
    named = rf"in use by a live run: host {socket.gethostname()}, pid {others.idle}\b.*another --run-dir"
    with pytest.raises(ConfigError, match=named):
        RunDir(path).claim()
    kill(others.idle)
    assert not is_in_use(path)
    run = RunDir(path)
    run.claim()
    run.release()


def test_a_killed_writer_leaves_status_json_whole_and_its_directory_to_the_next_life(others):
    path = others.root / "writing"
    for _ in range(300):
        assert json.loads((path / "status.json").read_text())["step"] == 7
    kill(others.writing)
    assert json.loads((path / "status.json").read_text())["status"] == "running"
    run = RunDir(path)
    run.claim()
    assert (run.earlier()["status"], run.earlier()["step"]) == ("running", 7)
    run.release()
    assert not (path / "run.lock").exists()


def test_of_eight_that_claim_at_once_one_wins_be_there_a_stale_lock_or_none(others):
    assert others.winners == [1, 1]


def test_who_waited_for_a_lock_file_that_was_then_removed_locks_the_new_one(tmp_path):
    lock = tmp_path / "run.lock"
    found = []

    def waits():
        with module.exclusive(lock) as file:
            found.append(os.path.samestat(os.fstat(file.fileno()), lock.stat()))

    with module.exclusive(lock):
        waiting = threading.Thread(target=waits)
        waiting.start()
        time.sleep(
            0.1
        )  # long enough to be waiting in flock; if not, the test passes without having tested
        lock.unlink()
        lock.touch()
    waiting.join(timeout=10)
    assert found == [True]


def test_a_reused_pid_is_not_taken_for_the_owner(tmp_path):
    write_lock(tmp_path)
    assert is_in_use(tmp_path)
    write_lock(tmp_path, start="1")
    assert not is_in_use(tmp_path)
    assert owner_after_claim(tmp_path) == (os.getpid(), process_start(os.getpid()))


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"namespace": "another container"}])
def test_an_owner_elsewhere_lives_as_long_as_it_beats(tmp_path, change):
    write_lock(tmp_path, **change, pid=1, job="123")
    with pytest.raises(ConfigError, match=r"in use by a live run: .*pid 1, job 123"):
        RunDir(tmp_path).claim()
    beat = time.time() - module.STALE_S - 1
    os.utime(tmp_path / "run.lock", (beat, beat))
    run = RunDir(tmp_path)
    run.claim()
    run.release()


def test_a_job_that_slurm_has_started_again_need_not_wait_for_its_last_lifes_lock(
    tmp_path, monkeypatch
):
    write_lock(tmp_path, host="elsewhere", pid=1, job="123", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    with pytest.raises(ConfigError, match="in use by a live run"):
        RunDir(tmp_path).claim()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "one")
    write_lock(tmp_path, host="elsewhere", pid=1, job="123@two", restart=0)
    with pytest.raises(
        ConfigError, match="in use by a live run: host elsewhere, pid 1, job 123@two"
    ):
        RunDir(tmp_path).claim()
    write_lock(tmp_path, host="elsewhere", pid=1, job="123@one", restart=0)
    run = RunDir(tmp_path)
    run.claim()
    run.release()


def test_ranks_that_torchrun_starts_anew_wait_for_the_lock_of_one_on_a_lost_node(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setattr(module, "STALE_S", 2.0)
    monkeypatch.setattr(module, "BEAT_S", 60.0)
    waits = []

    def wait(seconds: float) -> None:
        """The lock grows old meanwhile."""
        waits.append(seconds)
        beat = (tmp_path / "run.lock").stat().st_mtime - seconds
        os.utime(tmp_path / "run.lock", (beat, beat))

    monkeypatch.setattr(module.time, "sleep", wait)
    write_lock(tmp_path, host="lost", pid=1, job="123")
    with pytest.raises(ConfigError, match="in use by a live run"):
        RunDir(tmp_path).claim()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    os.utime(tmp_path / "run.lock")
    assert owner_after_claim(tmp_path)[0] == os.getpid()
    assert waits
    waits.clear()
    write_lock(tmp_path, host="elsewhere", pid=1, job="another")
    with pytest.raises(ConfigError, match="in use by a live run"):
        RunDir(tmp_path).claim()
    assert not waits


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    run = RunDir(tmp_path)
    run.claim()
    os.utime(tmp_path / "run.lock", (0, 0))
    until = time.monotonic() + 5
    while (tmp_path / "run.lock").stat().st_mtime == 0 and time.monotonic() < until:
        time.sleep(0.01)
    run.release()
    assert time.monotonic() < until


def test_a_lock_torn_by_a_crash_does_not_lock_for_ever(tmp_path):
    (tmp_path / "run.lock").write_text('{"host": "x", "pi')
    assert not is_in_use(tmp_path)
    assert owner_after_claim(tmp_path) == (os.getpid(), process_start(os.getpid()))


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(
            ConfigError,
            match=rf"--run-dir {path}: cannot be written \(.+\). Type another --run-dir",
        ):
            RunDir(path).claim()


def test_status_is_one_of_five_and_numbers_stay_json(tmp_path):
    run = RunDir(tmp_path)
    content = run.status(
        "failed",
        reason="--hf-token=abcdefgh",
        step=3,
        epoch=1,
        metrics={"loss": float("nan")},
        exit_code=1,
    )
    assert json.loads((tmp_path / "status.json").read_text()) == {
        "status": "failed",
        "reason": "--hf-token=[redacted]",
        "step": 3,
        "epoch": 1,
        "metrics": {"loss": "nan"},
        "weights_sha256": "",
        "exit_code": 1,
    }
    assert list(content) == list(json.loads((tmp_path / "status.json").read_text()))
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    with pytest.raises(AssertionError):
        run.status("done")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    run = RunDir(tmp_path)
    run.write_json("settings.json", {"lr": 0.1})
    with pytest.raises(TypeError):
        run.write_json("settings.json", {"lr": object()})
    assert json.loads((tmp_path / "settings.json").read_text()) == {"lr": 0.1}
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]


def test_default_names_tell_recipe_and_time_or_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = default_name("digits", {})
    assert name.parent == Path("runs")
    assert time.strptime(name.name, "digits-%Y%m%d-%H%M%S")
    assert default_name("my recipe", {"SLURM_JOB_ID": "17"}) == Path("runs/my-recipe-17")
    array = {"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}
    assert default_name("digits", array) == Path("runs/digits-17_2")


def test_runs_of_the_same_second_get_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = set()
    for _ in range(5):
        name = default_name("digits", {})
        name.mkdir(parents=True)
        names.add(name)
    assert len(names) == 5


def test_an_owner_reads_back_as_it_was_written(tmp_path):
    write_lock(tmp_path)
    with (tmp_path / "run.lock").open() as file:
        owner = module._read_owner(file)
    assert isinstance(owner, Owner)
    assert owner == module._this_process()
