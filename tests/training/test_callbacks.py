"""The observers that ddp_kit ships."""

import json
import logging
from pathlib import Path

import pytest
from cases import Settings, recipe

import ddp_kit
from ddp_kit.callbacks import Profile, StepTimes


def test_a_profile_holds_the_steps_it_was_asked_for(tmp_path: Path) -> None:
    settings = Settings(max_steps=6, run_dir=str(tmp_path / "run"))
    ddp_kit.run(
        recipe(settings, callbacks=[Profile(tmp_path / "traces", after=2, steps=3)]), settings
    )
    names = [
        event.get("name", "")
        for event in json.loads((tmp_path / "traces" / "rank-0.json").read_text())["traceEvents"]
    ]
    assert names.count("Optimizer.step#SGD.step") == 3


def test_step_times_are_logged_at_the_end(tmp_path: Path) -> None:
    settings = Settings(max_steps=5, run_dir=str(tmp_path / "run"))
    times = StepTimes()
    ddp_kit.run(recipe(settings, callbacks=[times]), settings)
    assert len(times.seconds) == 5
    assert "step times: median" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()


def test_a_run_too_short_for_its_profile_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(max_steps=2, run_dir=str(tmp_path / "run"))
    with caplog.at_level(logging.INFO):
        ddp_kit.run(recipe(settings, callbacks=[Profile(tmp_path / "traces")]), settings)
    assert "before step 13" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()
