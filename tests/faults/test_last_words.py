"""What a run leaves as its last word, whatever state its terminal, disk, files and signals are in."""

import json
import os
import re
import resource
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from launching import train
from paths import KIT
from warm import TRAIN, started

from ddp_kit.io.atomic import make_private_folder
from ddp_kit.lifecycle.run_dir import RunDir
from ddp_kit.lifecycle.status import StatusFile, status_content

ODD = str(KIT / "odd_ends.py")
ENDLESS = ("--max-steps", "100000")


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "status.json").read_text())
    return found


def test_an_exception_without_a_message_of_its_own_is_told_all_the_same(tmp_path: Path) -> None:
    ended = train("--odd", "mute", folder=tmp_path, recipe=ODD)
    assert ended.codes == [1, 1], ended.errors
    assert ended.status["status"] == "failed"
    assert ended.status["reason"] == (
        "rank 1: MuteError: (its message cannot be made: ZeroDivisionError)"
    )
    assert ended.is_clean()


def test_a_status_that_finds_no_room_or_no_descriptor_is_written_all_the_same(
    tmp_path: Path,
) -> None:
    place = tmp_path / "status.json"
    file = StatusFile(place)
    file.open()
    file.write(status_content("running", step=3))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        file.write(status_content("failed", step=4))
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        file.close()
    assert json.loads(place.read_text())["status"] == "failed"


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of one's own to fill takes root")
def test_a_disk_that_is_full_at_the_very_end_leaves_a_finished_run_finished(
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("a disk of one's own cannot be mounted here")
    try:
        words = [ODD, "--odd", "full", "--run-dir", str(disk / "run")]
        with started(TRAIN, *words, folder=tmp_path) as run:
            assert run.ended() == 0, run.output
        assert "Traceback" not in run.output
        told = json.loads((disk / "run" / "status.json").read_text())
        assert (told["status"], told["step"], told["exit_code"]) == ("finished", 6, 0)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_status_json_has_the_step_while_a_run_lives(tmp_path: Path) -> None:
    with started(
        TRAIN, ODD, "--odd", "beats", *ENDLESS, "--run-dir", str(tmp_path / "run"), folder=tmp_path
    ) as run:
        run.says("step 3 is done")
        run.until(lambda: status(tmp_path)["step"] >= 3)
        assert status(tmp_path)["status"] == "running"
        run.send(signal.SIGTERM)
        assert run.ended() == 143, run.output
    assert status(tmp_path)["status"] == "preempted"


def test_no_heartbeat_comes_after_the_last_word(tmp_path: Path) -> None:
    file = StatusFile(tmp_path / "status.json")
    file.write(status_content("running", step=1))
    file.follow(lambda: (7, 0))
    file.beat()
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 7
    file.write(status_content("finished", step=8))
    file.beat()
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("numbers", "code", "word"),
    [
        ((signal.SIGINT, signal.SIGINT), -signal.SIGINT, "stopped"),
        ((signal.SIGINT, signal.SIGTERM), -signal.SIGTERM, "preempted"),
    ],
)
def test_a_second_signal_leaves_at_once_and_says_so(
    numbers: tuple[signal.Signals, ...], code: int, word: str, tmp_path: Path
) -> None:
    with started(
        TRAIN, ODD, "--odd", "sleeps", *ENDLESS, "--run-dir", str(tmp_path / "run"), folder=tmp_path
    ) as run:
        run.says("step 3 is done")
        for number in numbers:
            run.send(number)
            time.sleep(0.3)
        assert run.ended() == code, run.output
    told = status(tmp_path)
    assert (told["status"], told["exit_code"]) == (word, 128 - code)
    assert told["reason"] == f"a second {numbers[1].name}: left at once"


def test_a_run_that_may_open_few_files_does_not_stay_running(tmp_path: Path) -> None:
    words = [ODD, "--odd", "few files", "--num-workers", "4", "--run-dir", str(tmp_path / "run")]
    with started(TRAIN, *words, folder=tmp_path) as run:
        assert run.ended() not in (0, None), run.output
    assert not (tmp_path / "run" / "status.json").exists() or (
        status(tmp_path)["status"] == "failed"
    )


def test_blame_names_the_rank_that_the_message_names(tmp_path: Path) -> None:
    ended = train("--odd", "nan", folder=tmp_path, recipe=ODD)
    assert ended.codes == [1, 1]
    found = re.match(r"rank (\d): .* is not finite on rank (\d),", ended.status["reason"])
    assert found
    assert found[1] == found[2] == "1"


def test_a_run_that_ends_by_a_nan_finishes_the_save_in_flight_and_names_it(
    tmp_path: Path,
) -> None:
    ended = train(
        "--odd",
        "nan",
        "--save-every",
        "2",
        folder=tmp_path,
        recipe=ODD,
        env={"DISK": "stall 0 4 1.0,stall 1 4 1.0"},
        limit_s=30,
    )
    assert ended.codes == [1, 1], ended.errors
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir()
    assert "to go on from step 4: " in ended.errors


def test_what_to_go_on_from_is_the_newest_checkpoint_that_is_there(tmp_path: Path) -> None:
    ended = train(
        "--odd",
        "raises",
        "--save-every",
        "2",
        folder=tmp_path,
        recipe=ODD,
        limit_s=30,
    )
    assert ended.codes == [1, 1], ended.errors
    assert "to go on from step 4: " in ended.errors


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o700), (0o277, 0o500)])
def test_run_directories_are_their_owners_alone_and_a_stricter_umask_stays(
    umask: int, mode: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        make_private_folder(tmp_path / "run")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == mode


def test_a_run_makes_its_directory_private(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "above" / "run")
    run.claim()
    run.release()
    assert stat.S_IMODE((tmp_path / "above" / "run").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "above").stat().st_mode) != 0o700
