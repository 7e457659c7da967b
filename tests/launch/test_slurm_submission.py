"""What a submission hands to sbatch, with a stand-in for it, and what it leaves."""

import os
from pathlib import Path

import pytest
from slurm_plans import plan, submitted

from ddp_kit.launch.environment import outside_job
from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.runs import resubmit
from ddp_kit.launch.slurm import cluster
from ddp_kit.launch.slurm.planning import planned
from ddp_kit.launch.slurm.script import render
from ddp_kit.launch.slurm.submit import main as slurm_main
from ddp_kit.launch.slurm.submit import submit

pytestmark = pytest.mark.usefixtures("in_a_project")


def fake_sbatch(answer: str, monkeypatch: pytest.MonkeyPatch, *, folder: str) -> None:
    """An sbatch that keeps the script and says `answer`, and the folder of a submission."""
    Path("bin").mkdir()
    Path(folder).mkdir(parents=True)
    for name in ("sbatch", "srun"):
        Path("bin", name).write_text(f'#!/bin/sh\ncp "$1" submitted.sh; echo "{answer}"\n')
        Path("bin", name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path('bin').absolute()}:/usr/bin:/bin")


def test_submitit_hands_our_script_to_sbatch_and_its_answer_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ddp_kit.launch.slurm.executor import Executor

    made = plan("--nodes", "2", "--nproc-per-node", "2")
    fake_sbatch("Submitted batch job 17", monkeypatch, folder=made.folder)
    handed = Executor(made).submit_plan()
    assert [job.job_id for job in handed] == ["17"]
    assert handed[0].num_tasks == 4
    assert Path("submitted.sh").read_text() == render(made)
    left = sorted(path.name for path in Path(made.folder).iterdir())
    assert left == ["17_submission.sh", "17_submitted.pkl"]


def test_what_a_submission_leaves_is_its_owners_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job needs the recipe's words, and the variables of --env, which may be secrets."""
    made = planned(["--env", "KEY=secret", "recipe.py", "--token", "secret"])[0]
    fake_sbatch("Submitted batch job 17", monkeypatch, folder=made.folder)
    monkeypatch.setattr(cluster, "require_fits", lambda plan: None)
    monkeypatch.setattr(cluster, "submitted_to", lambda plan: "here")
    plan_json = Path(made.folder) / "plan.json"
    plan_json.write_text("of an earlier submission")
    submit(made)
    assert "secret" in plan_json.read_text()
    modes = {path.name: path.stat().st_mode & 0o777 for path in Path(made.folder).iterdir()}
    assert modes.pop("jobs.jsonl") & 0o600 == 0o600  # it holds no words
    assert modes == dict.fromkeys(("17_submission.sh", "17_submitted.pkl", "plan.json"), 0o600)


def test_an_answer_of_sbatch_that_names_no_job_is_said_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ddp_kit.launch.slurm.executor import Executor

    made = plan()
    fake_sbatch("17;other", monkeypatch, folder=made.folder)
    with pytest.raises(
        LaunchError,
        match=r'"17;other": expected .Submitted batch job N.\. If there is one .*: scancel N',
    ):
        Executor(made).submit_plan()
    assert list(Path(made.folder).iterdir()) == []


def test_what_is_submitted_inherits_no_rank_and_the_submitter_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"RANK": "3", "DDP_KIT_REQUEUE": "1", "SLURM_TIME_FORMAT": "%s"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with outside_job():
        assert {name for name in given if name in os.environ} == {"SLURM_TIME_FORMAT"}
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with outside_job():
        assert not {name for name in given if name in os.environ}
    assert {name: os.environ[name] for name in given} == given


def test_resubmitting_changes_what_is_typed_and_leaves_bad_nodes_out() -> None:
    run = submitted("a", exclude="n7", qos="long")
    (run.folder / "bad_nodes").write_text("n3\nn7\n")
    again = resubmit.plan_again(run, {"nodes": 4, "words": ["--max-steps", "9"]})
    assert (again.nodes, again.processes, again.qos, again.exclude) == (4, 2, "long", "n7,n3")
    assert again.runs[0].words == ("recipe.py", "--run-dir", str(run.folder), "--max-steps", "9")
    Path("config.yaml").write_text("num_machines: 3\nnum_processes: 12\n")
    again = resubmit.plan_again(run, {"launcher": "accelerate", "accelerate_config": "config.yaml"})
    assert (again.nodes, again.processes) == (3, 4)
    with pytest.raises(LaunchError, match="--nproc-per-node 2 makes 6 processes"):
        resubmit.plan_again(
            run,
            {"launcher": "accelerate", "accelerate_config": "config.yaml", "nproc_per_node": "2"},
        )
    with pytest.raises(LaunchError, match="has no effect without --launcher accelerate"):
        resubmit.plan_again(run, {"accelerate_config": "config.yaml"})
    (run.folder / "launch" / "plan.json").unlink()
    with pytest.raises(LaunchError, match="was not submitted to SLURM"):
        resubmit.plan_again(run, {})


def test_one_point_of_a_sweep_cannot_change_the_code_of_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    submitted("grid/lr=1", snapshot=str(Path("runs/grid/code").absolute()))
    assert resubmit.main(["runs/grid/lr=1", "--new-code"]) == 2
    assert "code is the whole sweep's" in capsys.readouterr().err


def test_a_torn_plan_and_a_dry_run_in_the_wrong_place_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = submitted("a")
    (run.folder / "launch" / "plan.json").write_text('{"nodes": 1')
    with pytest.raises(LaunchError, match=r"the plan is torn .* ddp-kit slurm"):
        resubmit.plan_again(run, {})
    assert slurm_main(["recipe.py", "--dry-run"]) == 2
    assert "--dry-run comes after the recipe" in capsys.readouterr().err
