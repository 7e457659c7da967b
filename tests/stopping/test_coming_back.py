"""The next attempt of a run: what it says was lost, and when a job that gets nowhere is ended."""

import json
import signal
from pathlib import Path

import pytest
from patient_runs import REQUEUE, events, run

from ddp_kit.errors import DdpKitError
from ddp_kit.lifecycle.history import job_facts, lives_of_job, require_progress


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
        count = {}
        if life:
            count["SLURM_RESTART_COUNT"] = str(life)
        cut = run(tmp_path, ACT="SIGKILL", world_size=1, **job, **count)
        assert -signal.SIGKILL in cut.codes, cut.errors
    refused = run(tmp_path, SLURM_RESTART_COUNT="3", **job)
    assert refused.codes == [1, 1]
    words = "3 lives of this job have begun at step 0 and none has left a later checkpoint"
    assert refused.errors.count(words) == 1
    assert (refused.status["status"], refused.status["exit_code"]) == ("failed", 1)
    assert not (refused.run_dir / "requeue").exists()
    starts = events(refused.run_dir, "start")
    assert [event.get("job") for event in starts] == ["77"] * 3
    assert [event.get("restart") for event in starts] == [0, 1, 2]
    assert (
        run(tmp_path, world_size=1, **(job | {"SLURM_JOB_ID": "78"})).status["status"] == "finished"
    )


def test_lives_of_another_job_of_the_same_number_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"SLURM_JOB_ID": "77", "SLURM_CLUSTER_NAME": "here", "SLURM_RESTART_COUNT": "2"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)

    def left(*lives: tuple[int, str]) -> list[int | None]:
        lines = [
            {"event": "resume", "job": "77", "step": step, "restart": restart, "cluster": cluster}
            for step, (restart, cluster) in enumerate(lives)
        ]
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return [life.step for life in lives_of_job(tmp_path, job_facts())]

    assert left((0, "here"), (0, "elsewhere"), (1, "here"), (1, "elsewhere")) == [0, 2]
    # the count of jobs began anew
    assert left((0, "here"), (1, "here"), (2, "here"), (0, "here"), (1, "here")) == [3, 4]
    assert left((0, "here"), (1, "here"), (2, "here"), (3, "here")) == []


def test_lives_that_came_further_are_progress() -> None:
    require_progress([0, 3, 3], step=3)
    require_progress([3, 3, 3], step=6)
    with pytest.raises(DdpKitError, match="3 lives of this job have begun at step 3"):
        require_progress([0, 3, 3, 3], step=3)
