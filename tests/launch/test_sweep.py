"""Sweeps: their points, and those that run without SLURM."""

import dataclasses
import json
from pathlib import Path

import pytest
from paths import KIT
from slurm_plans import plan
from warm import started

from ddp_kit.launch.local import processes
from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.runs import grid, sweep

PACED = str(KIT / "paced.py")
SHORT = ("--max-steps", "3")
pytestmark = pytest.mark.usefixtures("in_a_project")


def test_a_grid_gives_every_combination_and_refuses_what_it_cannot_name() -> None:
    points = grid.points_of(["lr=0.1,0.2", "seed=0,1"])
    assert [grid.folder_of(point) for point in points] == [
        "lr=0.1,seed=0",
        "lr=0.1,seed=1",
        "lr=0.2,seed=0",
        "lr=0.2,seed=1",
    ]
    assert grid.flags_of(points[1]) == ["--lr", "0.1", "--seed", "1"]
    assert grid.folder_of({"data-root": "/a/b%c"}) == "data-root=_a_b_c"
    for name in ("run-dir", "run_dir"):
        with pytest.raises(
            LaunchError,
            match=rf"--grid {name}=a,b: the points have folders of their own\. --name NAME",
        ):
            grid.points_of([f"{name}=a,b"])
    with pytest.raises(LaunchError, match="--parallel -1: expected 0 or more"):
        dataclasses.replace(plan(), parallel=-1)
    with pytest.raises(
        LaunchError,
        match=r"--grid lr: expected.*--grid seed is given twice.*--grid x=a/b,a%b: some of these",
    ):
        grid.points_of(["lr", "seed=1", "seed=2", "x=a/b,a%b"])


def test_a_sweep_here_refuses_what_only_slurm_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--grid", "lr=1,2", "--partition", "gpu", "recipe.py"]) == 2
    assert "--partition: means something to SLURM only" in capsys.readouterr().err
    assert (
        sweep.main(
            [
                "--grid",
                "lr=1,2",
                "--name",
                "s",
                "--nproc-per-node",
                "2",
                "--dry-run",
                "recipe.py",
                "--seed",
                "3",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out.splitlines()
    home = Path("runs/s").absolute()
    assert shown == [
        f"ddp-kit run --nproc-per-node 2 recipe.py --seed 3 --lr {lr} --run-dir {home}/lr={lr}"
        for lr in (1, 2)
    ]
    assert sweep.main(["--grid", "lr=1,2", "recipe.py", "--run-dir", "x"]) == 2
    assert "Type --name NAME" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_a_sweeps_grid_is_its_owners_alone_and_the_same_sweep_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A point's values may be secrets."""
    monkeypatch.setattr(processes, "run", lambda plan: 0)
    words = ["--grid", "token=secret,other", "--name", "s", "--nproc-per-node", "1", "recipe.py"]
    assert sweep.main(words) == 0
    assert Path("runs/s/sweep.json").stat().st_mode & 0o777 == 0o600
    Path("runs/s/sweep.json").chmod(0o644)
    assert sweep.main(words) == 0
    assert Path("runs/s/sweep.json").stat().st_mode & 0o777 == 0o600
    assert "2 of 2 finished" in capsys.readouterr().out
    assert sweep.main(["--grid", "token=a", *words[2:]]) == 2
    assert "holds a sweep over another grid" in capsys.readouterr().err


def test_a_sweep_here_trains_one_point_after_another_and_ends_with_the_first_failure(
    tmp_path: Path,
) -> None:
    words = ["--here", "--grid", "fails-at=-1,2,9", "--name", "s", "--nproc-per-node", "2"]
    with started("ddp_kit.launch.runs.sweep", *words, PACED, *SHORT, folder=tmp_path) as run:
        assert run.ended() == 1, run.output
    assert "2 of 3 finished; not: fails-at=2" in run.output
    found = {
        path.parent.name: json.loads(path.read_text())["status"]
        for path in Path("runs/s").glob("*/status.json")
    }
    assert found == {"fails-at=-1": "finished", "fails-at=2": "failed", "fails-at=9": "finished"}
