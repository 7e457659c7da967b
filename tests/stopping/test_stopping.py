"""Asked to stop, by whatever: all ranks save at the same step and leave together."""

import json
import re
import signal
import time
from pathlib import Path

import pytest
from launching import train_on_rank
from lives import alone
from patient_runs import LONG, PATIENT, REQUEUE, ended_at, events, kinds, run, saved

from ddp_kit.checkpoint.format.reader import open_checkpoint
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.stopping.signals import Stop, StopFlag
from ddp_kit.testing import start_ranks

# What asks


def test_a_file_stop_is_never_requeued_and_the_next_life_has_lost_nothing(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "requeue").write_text("of the life before")
    ended = run(tmp_path, *LONG, ACT="STOP", **REQUEUE)
    assert ended.codes == [0, 0], ended.errors
    status = ended.status
    step = status["step"]
    assert status["status"] == "stopped"
    assert status["exit_code"] == 0
    assert status["reason"] == "the file STOP"
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
    ended = run(tmp_path, "--max-steps", "60", ACT="SAVE")
    assert ended.codes == [0, 0], ended.errors
    last, asked = saved(ended.run_dir)[:2]
    assert last == 60
    assert 3 < asked < 60
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
        pytest.param(
            ["--max-hours", "0.0012"],
            {},
            0,
            "stopped",
            marks=[pytest.mark.slow, pytest.mark.steady],
        ),
        (["--max-hours", "0.0012"], REQUEUE, 75, "preempted"),
        pytest.param(
            [],
            {"SLURM_JOB_END_TIME": "5"},
            143,
            "preempted",
            marks=[pytest.mark.slow, pytest.mark.steady],
        ),
        ([], {"SLURM_JOB_END_TIME": "5"} | REQUEUE, 75, "preempted"),
        ([], {"SLURM_JOB_END_TIME": "-5"}, 0, "finished"),
    ],
    ids=["hours", "hours, requeued", "job", "job, requeued", "another job"],
)
def test_the_clock_stops_a_run_in_time(
    flags: list[str], asked: dict[str, str], code: int, status: str, tmp_path: Path
) -> None:
    if "SLURM_JOB_END_TIME" in asked:
        end = int(time.time()) + int(asked["SLURM_JOB_END_TIME"])
        asked = asked | {"SLURM_JOB_END_TIME": str(end)}
    max_steps = "30" if status == "finished" else "1000"
    ended = run(tmp_path, "--max-steps", max_steps, *flags, **asked)
    assert ended.codes == [code, code], ended.errors
    assert (ended.status["status"], ended.status["exit_code"]) == (status, code)
    assert saved(ended.run_dir)[0] == ended.status["step"]
    assert (ended.run_dir / "requeue").exists() == (code == 75)
    assert len(set(ended_at(ended))) == 1


@pytest.mark.parametrize(
    "act",
    ["SIGTERM", "SIGUSR1", pytest.param("SIGUSR2", marks=[pytest.mark.slow, pytest.mark.steady])],
)
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
    args = [PATIENT, *LONG, "--run-dir", str(tmp_path / "run")]
    env = {"ACT": "SIGTERM", "AT_RANK": "1", "END_S": "0.5"} | REQUEUE
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
    [
        "saved peer:SIGTERM SIGKILL",
        "saved peer:SIGTERM raise",
        "saved SIGTERM peer:SIGTERM SIGKILL",
    ],
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
    opened = open_checkpoint(LocalDisk(cut.run_dir / "checkpoints"), 4, group=alone())
    assert dict(opened.manifest.metrics) == {}
    last = run(tmp_path / "cut", "--eval-every", "4")
    assert last.status == whole.status
    assert kinds(last.run_dir, "eval") == [4, 8]


@pytest.mark.slow
@pytest.mark.steady
def test_a_stop_during_the_test_evaluation_leaves_it_to_the_next_life(tmp_path: Path) -> None:
    rule = ["--early-stop.metric=loss", "--early-stop.min-delta=9", "--early-stop.patience=1"]
    args = ["--tests", "--eval-every", "4", "--max-steps", "40", *rule]
    whole = run(tmp_path / "whole", *args)
    assert whole.status["reason"].startswith("stopped early")
    # 5 looks were those of the evaluation
    asked = {"ACT": "SIGTERM", "AT_STEP": "8", "AT_LOOK": "6", "LOOK_S": "0.1"}
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
