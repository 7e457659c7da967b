"""A job that is started again and again without a new step ends, with what each of its lives has ended by; and what is not finished is not said to be."""

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from launching import Ended
from paths import KIT
from patient_runs import REQUEUE, events, run, torchrun
from warm import LAUNCHER, started

from ddp_kit.lifecycle.history import NoProgressError, require_progress, require_progress_so_far

LINGERING = str(KIT / "lingering.py")
NO_STEP = "3 lives of this job have done no new step, so it is not requeued."
AT_ONCE = "SIGUSR1 before the first step"


def early(folder: Path, *args: str, **env: str) -> Ended:
    """A life that is warned before its first step."""
    return run(folder, *args, ACT_AT_ONCE="SIGUSR1", **(REQUEUE | env))


def test_a_launcher_is_not_asked_a_third_time_for_a_life_without_a_step(tmp_path: Path) -> None:
    for _ in range(2):
        assert early(tmp_path).codes == [75, 75]
        assert (tmp_path / "run" / "requeue").exists()
    # steps that were saved are progress: what counted until then counts no more
    came_further = run(tmp_path, "--max-steps", "1000", ACT="SIGUSR1", **REQUEUE)
    assert came_further.codes == [75, 75], came_further.errors
    step = came_further.status["step"]
    assert step >= 3
    for _ in range(2):
        assert early(tmp_path, "--max-steps", "1000").codes == [75, 75]
        assert (tmp_path / "run" / "requeue").exists()
    last = early(tmp_path, "--max-steps", "1000")
    assert last.codes == [1, 1], last.errors
    assert last.errors.count(NO_STEP) == 1
    ended_by = f"They ended by: (1) {AT_ONCE}; (2) {AT_ONCE}; (3) {AT_ONCE}."
    assert ended_by in last.errors
    assert (last.status["status"], last.status["exit_code"]) == ("failed", 1)
    assert last.status["step"] == step
    assert ended_by in last.status["reason"]
    # a person may go on
    assert run(tmp_path, "--max-steps", "1000", ACT="STOP", AT_STEP=str(step + 2)).codes == [0, 0]


def test_stops_at_the_step_of_the_start_are_no_progress(tmp_path: Path) -> None:
    found = [run(tmp_path, "--max-hours", "1e-9", **REQUEUE) for _ in range(3)]
    assert [ended.codes for ended in found] == [[75, 75], [75, 75], [1, 1]], found[-1].errors
    last = found[-1]
    assert last.errors.count(NO_STEP) == 1
    assert "(3) --max-hours are over" in last.status["reason"]
    assert last.status["status"] == "failed"
    assert not (last.run_dir / "requeue").exists()


def test_a_fourth_life_says_what_the_three_before_have_ended_by(tmp_path: Path) -> None:
    def life(restart: int, **env: str) -> Ended:
        job = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(restart)}
        return run(tmp_path, world_size=1, **(job | REQUEUE | env))

    assert life(0, ACT="raise", AT_STEP="2").codes == [1]
    assert life(1, ACT="SIGKILL").codes == [-signal.SIGKILL]
    ended_by = (
        "They ended by: (1) ValueError: a fault of its own; (2) no word (killed); "
        "(3) SIGUSR2 before the first step."
    )
    third = life(2, ACT_AT_ONCE="SIGUSR2")
    assert third.codes == [1]
    assert f"{NO_STEP} {ended_by}" in third.errors
    assert not (third.run_dir / "requeue").exists()
    # somebody starts the job again all the same
    last = life(3)
    assert last.codes == [1]
    words = (
        "3 lives of this job have begun at step 0 and none has left a later checkpoint, so this "
        f"one ends here. {ended_by}"
    )
    assert words in last.errors
    assert words in last.status["reason"]
    assert life(4).codes == [1]


def test_lives_that_never_began_do_not_keep_one_from_it_that_does() -> None:
    require_progress([None, None, None], step=0)
    require_progress([0, None], step=0)
    require_progress([0, 3, None], step=3)
    require_progress_so_far([0, None], began=3, endings=[])
    with pytest.raises(NoProgressError):
        require_progress([3, None, None], step=3)
    with pytest.raises(NoProgressError):
        require_progress_so_far([3, None], began=3, endings=[])


@pytest.mark.slow
@pytest.mark.steady
def test_torchrun_that_restarts_the_ranks_to_no_end_is_told_so(tmp_path: Path) -> None:
    env = {"ACT": "raise", "AT_STEP": "1", "AT_RANK": "1"}
    with torchrun(tmp_path, restarts="3", **env) as agent:
        output, _ = agent.communicate(timeout=400)
    assert agent.returncode == 1, output
    begun = events(tmp_path / "run", "start", "resume")
    assert [event["step"] for event in begun] == [0, 0, 0]
    left = json.loads((tmp_path / "run" / "status.json").read_text())
    assert left["status"] == "failed"
    assert "3 lives of this job have begun at step 0" in left["reason"]
    assert left["reason"].count("ValueError: a fault of its own") == 3


def status(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run" / "status.json").read_text())
    return found


def words(folder: Path) -> list[str]:
    return ["--nproc-per-node", "2", LINGERING, "--run-dir", str(folder / "run")]


def test_a_run_is_finished_once_every_rank_has_come_out_of_on_end(tmp_path: Path) -> None:
    with started(LAUNCHER, *words(tmp_path), folder=tmp_path) as ranks:
        ranks.until(lambda: (tmp_path / "end-0").exists() and (tmp_path / "end-1").exists())
        # long enough for rank 0 to write what it wants to
        time.sleep(0.5)
        assert status(tmp_path)["status"] == "running"
        (tmp_path / "let-go").touch()
        assert ranks.ended() == 0, ranks.output
    assert status(tmp_path)["status"] == "finished"


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"WITHIN_S": "1"}, "rank 1 has not come out of on_end within 1 s"),
        ({"LINGER": "killed"}, "rank 1 was ended by SIGKILL"),
    ],
)
def test_a_rank_that_does_not_come_out_of_on_end_fails_the_run(
    env: dict[str, str], reason: str, tmp_path: Path
) -> None:
    with started(LAUNCHER, *words(tmp_path), folder=tmp_path, env=env, patience_s=3.0) as ranks:
        assert ranks.ended() != 0
        assert reason in ranks.output, ranks.output
    assert status(tmp_path)["status"] == "failed"
    assert reason in status(tmp_path)["reason"]
