"""A user's own `launch`, `recipes` and `tests` beside their recipe hide nothing of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from users_folders import make_users_folder

INSTALLED = [str(Path(sys.executable).with_name("ddp-kit"))]
# in front of all other places, Python looks for modules in the folder where this is typed
MODULE = [sys.executable, "-m", "ddp_kit.cli.main"]


def typed(*words: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Runs a command in that folder."""
    return subprocess.run(
        words,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def status(run: Path) -> Any:
    return json.loads((run / "status.json").read_text())["status"]


@pytest.mark.parametrize(
    "launch", ["launch", pytest.param("launch.py", marks=[pytest.mark.slow, pytest.mark.steady])]
)
def test_a_run_beside_a_users_own_launch_recipes_and_tests(launch: str, tmp_path: Path) -> None:
    folder = make_users_folder(tmp_path / "mine", launch=launch)
    words = ["run", "--nproc-per-node", "2", "recipe.py", "--max-steps", "2", "--run-dir", "run"]
    done = typed(*INSTALLED, *words, folder=folder)
    assert done.returncode == 0, done.stderr
    assert status(folder / "run") == "finished"


def test_a_sweep_beside_a_users_own_launch_recipes_and_tests(tmp_path: Path) -> None:
    """Its ranks are those of `ddp-kit run`."""
    folder = make_users_folder(tmp_path / "mine", launch="launch.py")
    words = ["sweep", "--here", "--dry-run", "--grid", "lr=0.1,0.2", "--nproc-per-node", "1"]
    done = typed(*MODULE, *words, "recipe.py", "--max-steps", "2", folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ddp-kit run --nproc-per-node 1 recipe.py --max-steps 2 --lr") == 2
