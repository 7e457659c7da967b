"""Stops through torchrun itself, whose agent sends signals, is killed, and restarts ranks."""

import json
import time
from pathlib import Path

import pytest
from patient_runs import REQUEUE, events, saved, torchrun


@pytest.mark.slow
@pytest.mark.steady
@pytest.mark.parametrize("act", ["raise", "SIGKILL"])
def test_under_torchrun_a_crashed_rank_is_a_failure(act: str, tmp_path: Path) -> None:
    with torchrun(tmp_path, ACT=act, AT_RANK="1", **REQUEUE) as agent:
        output, _ = agent.communicate(timeout=90)
    assert agent.returncode == 1, output
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed", output
    assert not (tmp_path / "run" / "requeue").exists()
    assert saved(tmp_path / "run") == [2]


@pytest.mark.slow
@pytest.mark.steady
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
@pytest.mark.steady
def test_torchrun_does_not_undo_a_stop_by_restarting_the_ranks(tmp_path: Path) -> None:
    with torchrun(tmp_path, restarts="2", ACT="SIGUSR1") as agent:
        output, _ = agent.communicate(timeout=90)
    assert agent.returncode == 0, output
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "preempted"
    assert [event["event"] for event in events(tmp_path / "run", "start", "resume")] == ["start"]
