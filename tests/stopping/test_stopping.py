"""Asked to stop, by whatever: all ranks save at the same step and leave together, and the next life has lost nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from launching import Ended, train, train_on_rank
from lives import alone
from paths import KIT

from ddp_kit.checkpoint.format.reader import open_checkpoint
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.retention import steps
from ddp_kit.errors import DdpKitError
from ddp_kit.lifecycle.history import require_progress, starts_of_job
from ddp_kit.stopping.signals import Stop, StopFlag
from ddp_kit.testing import start_ranks

PATIENT = str(KIT / "patient.py")
REQUEUE = {"DDP_KIT_REQUEUE": "1"}
LONG = ("--max-steps", "1000")


def run(folder: Path, *args: str, world_size: int = 2, **env: str) -> Ended:
    folder.mkdir(exist_ok=True)
    return train(*args, folder=folder, recipe=PATIENT, world_size=world_size, env=env, limit_s=30)


def events(run_dir: Path, *kinds: str) -> list[dict[str, Any]]:
    found = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return [event for event in found if event["event"] in kinds or not kinds]


def saved(run_dir: Path) -> list[int]:
    return steps(LocalDisk(run_dir / "checkpoints"))


def ended_at(ended: Ended) -> list[str]:
    """Where each rank's callback saw the end."""
    return [
        line
        for output in ended.outputs
        for line in output.splitlines()
        if line.startswith("ended after ")
    ]


def kinds(run_dir: Path, kind: str) -> list[int]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in records if record["kind"] == kind]


# What asks


def test_a_file_stop_is_never_requeued_and_the_next_life_has_lost_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "requeue").write_text("of the life before")
    ended = run(tmp_path, *LONG, ACT="STOP", **REQUEUE)
    assert ended.codes == [0, 0], ended.errors
    status, step = ended.status, ended.status["step"]
    assert (status["status"], status["exit_code"], status["reason"]) == (
        "stopped",
        0,
        "the file STOP",
    )
    assert 3 < step < 1000
    assert saved(ended.run_dir)[0] == step
    assert len(set(ended_at(ended))) == 1
    assert [event["message"] for event in events(ended.run_dir, "acknowledged")] == [
        "the file STOP"
    ]
    assert not (ended.run_dir / "STOP").exists()
    assert not (ended.run_dir / "requeue").exists()
    assert re.search(
        r"the file STOP: the stop took \d+\.\d s until everything was saved", ended.outputs[0]
    )
    again = run(tmp_path, "--max-steps", str(step + 2), "--change", "max_steps")
    assert again.status["status"] == "finished", again.errors
    assert f"resumed at step {step}: 0 steps lost" in again.outputs[0]


def test_a_file_save_goes_when_its_checkpoint_is_whole(tmp_path: Path) -> None:
    """Asked for at step 3, by which no save is due."""
    ended = run(tmp_path, "--max-steps", "110", ACT="SAVE")
    assert ended.codes == [0, 0], ended.errors
    last, asked = saved(ended.run_dir)[:2]
    assert last == 110
    assert 3 < asked < 110
    told = [
        (event["event"], event["step"]) for event in events(ended.run_dir, "save", "acknowledged")
    ]
    assert told[:2] == [("save", asked), ("acknowledged", asked)]
    assert not (ended.run_dir / "SAVE").exists()


def test_a_file_stop_that_is_there_before_the_first_step_leaves_nothing_half_done(
    tmp_path: Path,
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    ended = run(tmp_path)
    assert ended.codes == [0, 0], ended.errors
    assert (ended.status["status"], ended.status["step"]) == ("stopped", 0)
    assert ended.is_clean()
    assert run(tmp_path).status["status"] == "finished"


@pytest.mark.parametrize(
    ("flags", "asked", "code", "status"),
    [
        pytest.param(["--max-hours", "0.0012"], {}, 0, "stopped", marks=pytest.mark.slow),
        (["--max-hours", "0.0012"], REQUEUE, 75, "preempted"),
        pytest.param([], {"SLURM_JOB_END_TIME": "5"}, 143, "preempted", marks=pytest.mark.slow),
        ([], {"SLURM_JOB_END_TIME": "5"} | REQUEUE, 75, "preempted"),
        ([], {"SLURM_JOB_END_TIME": "-5"}, 0, "finished"),
    ],
    ids=["hours", "hours, requeued", "job", "job, requeued", "another job"],
)
def test_the_clock_stops_a_run_in_time(
    flags: list[str], asked: dict[str, str], code: int, status: str, tmp_path: Path
) -> None:
    if end := asked.get("SLURM_JOB_END_TIME"):
        asked = asked | {"SLURM_JOB_END_TIME": str(int(time.time()) + int(end))}
    ended = run(tmp_path, "--max-steps", "1000" if status != "finished" else "60", *flags, **asked)
    assert ended.codes == [code, code], ended.errors
    assert (ended.status["status"], ended.status["exit_code"]) == (status, code)
    assert saved(ended.run_dir)[0] == ended.status["step"]
    assert (ended.run_dir / "requeue").exists() == (code == 75)
    assert len(set(ended_at(ended))) == 1


@pytest.mark.parametrize("act", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_a_signal_is_requeued_where_the_launcher_asked(act: str, tmp_path: Path) -> None:
    ended = run(tmp_path, *LONG, ACT=act, AT_RANK="1", **REQUEUE)
    assert ended.codes == [75, 75], ended.errors
    assert (ended.status["status"], ended.status["exit_code"]) == ("preempted", 75)
    assert (ended.run_dir / "requeue").read_text() == f"{act} on rank 1\n"


@pytest.mark.parametrize(("act", "code"), [("SIGUSR1", 75), ("SIGTERM", 143)])
def test_before_the_first_step_a_warning_is_requeued_too(
    act: str, code: int, tmp_path: Path
) -> None:
    """SIGTERM is not: it may come from a launcher that has lost a rank, and SLURM itself brings back what it preempts."""
    ended = run(tmp_path, ACT=act, AT_STEP="0", **REQUEUE)
    assert ended.codes == [code, 1], ended.errors
    assert (ended.status["status"], ended.status["exit_code"]) == ("preempted", code)
    assert (ended.run_dir / "requeue").exists() == (code == 75)


def test_a_warning_before_anything_else_is_requeued_in_every_life(tmp_path: Path) -> None:
    for life in (1, 2):
        ended = run(tmp_path, ACT_AT_ONCE="SIGUSR1", **REQUEUE)
        assert ended.codes == [75, 75], ended.errors
        (ended.run_dir / "requeue").unlink()
        if life == 1:
            run(tmp_path, *LONG, ACT="STOP")


def test_a_persons_interrupt_is_not_requeued(tmp_path: Path) -> None:
    ended = run(tmp_path, *LONG, ACT="SIGINT", **REQUEUE)
    assert ended.codes == [130, 130], ended.errors
    assert not (ended.run_dir / "requeue").exists()


def test_an_agent_that_restarts_ranks_gets_no_code_to_restart_them_for(tmp_path: Path) -> None:
    ended = run(tmp_path, *LONG, TORCHELASTIC_MAX_RESTARTS="3", ACT="SIGTERM")
    assert ended.codes == [0, 0], ended.errors
    assert (ended.status["status"], ended.status["exit_code"]) == ("preempted", 143)


@pytest.mark.parametrize("act", ["SIGTERM SIGTERM", "SIGUSR1 SIGTERM"])
def test_a_repeated_sigterm_or_one_after_a_warning_still_saves(act: str, tmp_path: Path) -> None:
    """SLURM sends SIGTERM to all processes of a step, and torchrun's agent hands its own on to ranks that have had it."""
    ended = run(tmp_path, *LONG, ACT=act)
    assert ended.codes == [143, 143], ended.errors
    assert ended.status["reason"] == "SIGTERM on rank 0"
    assert saved(ended.run_dir)[0] == ended.status["step"]


def test_of_several_reasons_a_persons_counts() -> None:
    flag = StopFlag()
    for stop in (Stop.SIGTERM, Stop.FILE, Stop.MAX_HOURS):
        flag.ask(stop)
    assert flag.stop is Stop.FILE


# Leaving together


def test_no_rank_leaves_with_a_failure_before_rank_0_is_done(tmp_path: Path) -> None:
    """As `srun --kill-on-bad-exit=1` does: the first exit code that is not 0 gets the others killed."""
    args, env = (
        [PATIENT, *LONG, "--run-dir", str(tmp_path / "run")],
        {"ACT": "SIGTERM", "AT_RANK": "1", "END_S": "1.5"} | REQUEUE,
    )
    with start_ranks(
        train_on_rank,
        2,
        [args, args],
        str(tmp_path / "errors"),
        group=False,
        env=env,
        deadline_s=30,
    ) as ranks:
        while len(ranks.living) == 2:
            ranks.pool.receive(0.1)
        for rank in ranks.living:
            ranks.kill(rank, signal.SIGKILL)
        ranks.wait()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "preempted"
    assert (tmp_path / "run" / "requeue").exists()
    assert (tmp_path / "tracker-has-ended").exists()
    assert not (tmp_path / "run" / "run.lock").exists()


# A dead peer is no preemption


@pytest.mark.parametrize(
    "act",
    ["peer:SIGTERM SIGKILL", "peer:SIGTERM raise", "SIGTERM peer:SIGTERM SIGKILL"],
    ids=["killed", "raised", "both told"],
)
def test_a_sigterm_that_comes_with_a_peers_death_is_a_failure(act: str, tmp_path: Path) -> None:
    """torchrun sends SIGTERM to the survivors of a rank; SLURM may, when a node is lost."""
    ended = run(tmp_path, *LONG, "--save-every", "2", ACT=act, AT_RANK="1", **REQUEUE)
    assert ended.codes == [1, 1 if "raise" in act else -signal.SIGKILL], ended.errors
    assert ended.status["status"] == "failed"
    assert not (ended.run_dir / "requeue").exists()
    assert saved(ended.run_dir) == [2]


# During an evaluation


def test_a_stop_abandons_an_evaluation_at_the_same_batch_and_the_next_life_repeats_it(
    tmp_path: Path,
) -> None:
    whole = run(tmp_path / "whole", "--eval-every", "4")
    asked = {"ACT": "SIGTERM", "AT_STEP": "4", "AT_RANK": "1", "AT_LOOK": "1", "LOOK_S": "0.1"}
    cut = run(tmp_path / "cut", "--eval-every", "4", **asked)
    assert cut.codes == [143, 143], cut.errors
    assert set(ended_at(cut)) == {"ended after step 4, look 2: SIGTERM on rank 1"}  # of 5
    assert kinds(cut.run_dir, "eval") == []
    assert (
        dict(
            open_checkpoint(
                LocalDisk(cut.run_dir / "checkpoints"), 4, group=alone()
            ).manifest.metrics
        )
        == {}
    )
    last = run(tmp_path / "cut", "--eval-every", "4")
    assert last.status == whole.status
    assert kinds(last.run_dir, "eval") == [4, 8]


@pytest.mark.slow
def test_a_stop_during_the_test_evaluation_leaves_it_to_the_next_life(tmp_path: Path) -> None:
    rule = [
        "--early-stop.metric",
        "loss",
        "--early-stop.min-delta",
        "9",
        "--early-stop.patience",
        "1",
    ]
    args = ["--tests", "--eval-every", "4", "--max-steps", "40", *rule]
    whole = run(tmp_path / "whole", *args)
    assert whole.status["reason"].startswith("stopped early")
    asked = {
        "ACT": "SIGTERM",
        "AT_STEP": "8",
        "AT_LOOK": "6",
        "LOOK_S": "0.1",
    }  # 5 looks were those of the evaluation
    cut = run(tmp_path / "cut", *args, **asked)
    assert cut.codes == [143, 143], cut.errors
    last = run(tmp_path / "cut", *args)
    assert last.status == whole.status, last.errors
    assert kinds(last.run_dir, "test") == kinds(whole.run_dir, "test")


# How long it takes


def test_a_stop_takes_no_longer_than_was_said(tmp_path: Path) -> None:
    """The signal comes as a slow save is in flight."""
    asked = {
        "STEP_S": "0.4",
        "ACT": "SIGTERM",
        "AT_STEP": "8",
        "DISK": "stall 0 0 1.0,stall 1 0 1.0",
        "DDP_KIT_GRACE_S": "1",
    }
    ended = run(tmp_path, *LONG, "--save-every", "4", **asked)
    assert ended.codes == [143, 143], ended.errors
    (said,) = (event["message"] for event in events(ended.run_dir, "grace"))
    assert re.fullmatch(
        r"a stop needs up to [\d.]+ s: step [\d.]+ s, agreement [\d.]+ s, save in flight [\d.]+ s, save [\d.]+ s",
        said,
    )
    needs, step, agreement, _, save = (float(number) for number in re.findall(r"([\d.]+) s", said))
    assert (step, agreement) == (pytest.approx(0.4, abs=0.3), pytest.approx(0.8, abs=0.6))
    assert save >= 1.0
    assert needs == pytest.approx(step + agreement + 2 * save, abs=0.2)
    (took,) = re.findall(r"the stop took ([\d.]+) s", ended.outputs[0])
    assert 1.5 < float(took) < needs + 1
    assert said in ended.outputs[0]
    assert (
        "DDP_KIT_GRACE_S gives 1.0 s: the run may be killed before it has saved" in ended.outputs[0]
    )
    assert saved(ended.run_dir)[:2] == [ended.status["step"], 8]


# Coming back


def test_a_life_says_what_was_lost(tmp_path: Path) -> None:
    cut = run(tmp_path, "--save-every", "5", ACT="SIGKILL", AT_STEP="7", AT_RANK="1")
    assert cut.status["status"] == "failed"
    last = run(tmp_path, "--save-every", "5")
    assert "resumed at step 5: 2 steps lost" in last.outputs[0], last.errors
    (event,) = events(last.run_dir, "resume")
    assert (event["step"], event["message"]) == (5, "2 steps lost")


def test_a_job_that_goes_round_in_circles_ends_and_a_start_by_hand_does_not(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "77", **REQUEUE}
    for life in range(3):
        cut = run(
            tmp_path,
            ACT="SIGKILL",
            AT_RANK="1",
            **job,
            **({"SLURM_RESTART_COUNT": str(life)} if life else {}),
        )
        assert -signal.SIGKILL in cut.codes, cut.errors
    refused = run(tmp_path, SLURM_RESTART_COUNT="3", **job)
    assert refused.codes == [1, 1]
    assert (
        refused.errors.count(
            "3 lives of this job have begun at step 0 and none has left a later checkpoint"
        )
        == 1
    )
    assert (refused.status["status"], refused.status["exit_code"]) == ("failed", 1)
    assert not (refused.run_dir / "requeue").exists()
    assert [
        (event.get("job"), event.get("restart")) for event in events(refused.run_dir, "start")
    ] == [("77", 0), ("77", 1), ("77", 2)]
    assert run(tmp_path, **(job | {"SLURM_JOB_ID": "78"})).status["status"] == "finished"


def test_lives_of_another_job_of_the_same_number_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"SLURM_JOB_ID": "77", "SLURM_CLUSTER_NAME": "here", "SLURM_RESTART_COUNT": "2"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)

    def left(*lives: tuple[int, str]) -> list[int]:
        lines = [
            {"event": "resume", "job": "77", "step": step, "restart": restart, "cluster": cluster}
            for step, (restart, cluster) in enumerate(lives)
        ]
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return starts_of_job(tmp_path)

    assert left((0, "here"), (0, "elsewhere"), (1, "here"), (1, "elsewhere")) == [0, 2]
    assert left((0, "here"), (1, "here"), (2, "here"), (0, "here"), (1, "here")) == [
        3,
        4,
    ]  # the count of jobs began anew
    assert left((0, "here"), (1, "here"), (2, "here"), (3, "here")) == []


def test_lives_that_came_further_are_progress() -> None:
    require_progress([0, 3, 3], step=3)
    require_progress([3, 3, 3], step=6)
    with pytest.raises(DdpKitError, match="3 lives of this job have begun at step 3"):
        require_progress([0, 3, 3, 3], step=3)


# Through torchrun itself


@contextmanager
def torchrun(folder: Path, *, restarts: str = "0", **env: str) -> Iterator["subprocess.Popen[str]"]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        restarts,
        "-m",
        "ddp_kit.train",
        PATIENT,
    ]
    path = os.pathsep.join(map(str, (Path(PATIENT).parents[1], Path(PATIENT).parent)))
    given = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | env
    words = [*command, *LONG, "--save-every", "2", "--run-dir", str(folder / "run")]
    with subprocess.Popen(
        words,
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as agent:
        yield agent
        agent.kill()


@pytest.mark.slow
@pytest.mark.parametrize("act", ["raise", "SIGKILL"])
def test_under_torchrun_a_crashed_rank_is_a_failure(act: str, tmp_path: Path) -> None:
    with torchrun(tmp_path, ACT=act, AT_RANK="1", **REQUEUE) as agent:
        output, _ = agent.communicate(timeout=90)
    assert agent.returncode == 1, output
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed", output
    assert not (tmp_path / "run" / "requeue").exists()
    assert saved(tmp_path / "run") == [2]


@pytest.mark.slow
def test_ranks_whose_agent_is_killed_save_and_leave(tmp_path: Path) -> None:
    with torchrun(tmp_path) as agent:
        assert agent.stdout is not None
        assert any("step 5/" in line for line in agent.stdout)
        ranks = [int((tmp_path / f"pid-{rank}").read_text()) for rank in (0, 1)]
        agent.kill()
        agent.wait()
        end = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < end:
            time.sleep(0.1)
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "preempted"
    assert saved(tmp_path / "run")[0] == status["step"] > 5


@pytest.mark.slow
def test_torchrun_does_not_undo_a_stop_by_restarting_the_ranks(tmp_path: Path) -> None:
    with torchrun(tmp_path, restarts="2", ACT="SIGUSR1") as agent:
        output, _ = agent.communicate(timeout=90)
    assert agent.returncode == 0, output
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "preempted"
    assert [event["event"] for event in events(tmp_path / "run", "start", "resume")] == ["start"]
