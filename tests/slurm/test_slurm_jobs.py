"""Batch jobs on a real SLURM: what is submitted, how it ends, and what it says."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from clusters import Cluster
from paths import ROOT
from slurm_jobs import LONG, PACED, SHORT, Trained

from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.runs import cancel, jobs, logs
from ddp_kit.launch.runs.found import FoundRun
from ddp_kit.launch.slurm.script import render
from ddp_kit.launch.slurm.submit import main as slurm_main
from ddp_kit.launch.slurm.submit import planned


def test_sbatch_accepts_the_script_of_every_launcher_and_flag(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.enter(monkeypatch)
    monkeypatch.chdir(tmp_path)
    many = [
        "--mem",
        "100M",
        "--time",
        "0-1",
        "--partition",
        "low",
        "--exclude",
        "n1",
        "--cpus-per-task",
        "2",
        "--max-requeues",
        "0",
    ]
    many += [
        "--name",
        """it's a "name" # $HOME `x`;""",
        "--gpus-per-node",
        "2",
        "--sbatch",
        "exclusive",
        "--sbatch",
        "mail-user=a b",
    ]
    for words in (
        ["--nodes", "2", "--gpus-per-node", "4"],
        many,
        ["--launcher", "torchrun", "--nodes", "2"],
        ["--launcher", "accelerate"],
    ):
        path = tmp_path / "job.sh"
        path.write_text(
            render(planned([*words, PACED, "--run-dir", str(tmp_path / "a 'b' $c")])[0])
        )
        done = cluster.tried("sbatch", "--test-only", str(path))
        assert done.returncode == 0, done.stderr


def test_what_is_shown_is_what_is_submitted_and_hostile_names_change_nothing(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cluster.enter(monkeypatch)
    monkeypatch.chdir(tmp_path)
    name = """a'b "c" $(touch x) `touch y` #;&"""
    words = [
        "--name",
        name,
        "--setup",
        "exit 7",
        "--no-snapshot",
        PACED,
        "--run-dir",
        str(tmp_path / "runs" / name),
    ]
    assert slurm_main(["--dry-run", *words]) == 0
    shown = capfd.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert slurm_main(words) == 0
    job = capfd.readouterr().out.split()[1].rstrip(":")
    cluster.wait(job, state="FAILED")
    home = tmp_path / "runs" / name / "launch"
    assert (home / f"{job}_submission.sh").read_text() == shown
    assert (
        cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%j").rstrip(
            "\n"
        )
        == name
    )
    assert f"life 0 of job {job} on" in (home / f"{job}.log").read_text()
    (known,) = FoundRun(home.parent).jobs()
    assert (known.id, known.folder) == (job, str(home.parent))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_a_rank_that_raises_ends_the_job_with_1_and_its_traceback_is_found(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained("--fails-at", "2")
    run.ended("FAILED")
    assert run.cluster.facts(run.id)["ExitCode"] == "1:0"
    assert run.status["status"] == "failed"
    assert "the recipe's own fault" in run.said(1, "err")
    assert not (run.folder / "requeue").exists()
    error = run.job.exception()
    assert "rank 1" in str(error)
    assert "the recipe's own fault" in str(error)
    assert "Traceback" in str(run.job.task(1).exception())
    capsys.readouterr()
    assert logs.main([run.id]) == 0
    shown = capsys.readouterr().out
    assert "Traceback" in shown
    assert "ends with exit code 1" in shown
    assert jobs.main([str(run.folder.parent)]) == 0
    assert "failed" in capsys.readouterr().out


def test_cancelling_saves_first_and_nothing_is_left(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(*LONG, slurm=["--nproc-per-node", "1"])
    run.until_step(3)
    with pytest.raises(LaunchError, match=r"job \d+ \(running\) has it"):
        FoundRun(run.folder).require_free()
    assert slurm_main([PACED, "--run-dir", str(run.folder)]) == 2
    said = capsys.readouterr().err
    assert (
        f"job {run.id} (running) has it. Type another --run-dir, or: ddp-kit cancel {run.folder}"
        in said
    )
    assert cancel.main([str(run.folder)]) == 0
    run.ended("COMPLETED")
    assert run.status["status"] == "stopped"
    assert FoundRun(run.folder).newest_checkpoint() == run.status["step"] >= 3
    assert not (run.folder / "STOP").exists()
    with pytest.raises(LaunchError, match="nothing of it waits or runs"):
        cancel.cancel(FoundRun(run.folder), now=False)


def test_a_strangers_job_of_the_same_number_is_not_cancelled(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of another cluster in the same home: its job had the number that a stranger's has here."""
    run = trained(*LONG, name="here")
    (record,) = run.lines("launch/jobs.jsonl")
    assert record["cluster"] == "dev_cluster"
    ended = tmp_path / "runs" / "there"
    (ended / "launch").mkdir(parents=True)
    (ended / "launch" / "jobs.jsonl").write_text(
        json.dumps({"job": run.id, "time": 1, "folder": str(ended / "launch")}) + "\n"
    )
    (ended / "status.json").write_text('{"status": "finished"}')
    for words in ([], ["--now"]):
        assert cancel.main([*words, str(ended)]) == 2
        assert "nothing of it waits or runs" in capsys.readouterr().err
    assert FoundRun(ended).is_over()
    assert run.cluster.state(run.id) in ("PENDING", "RUNNING")
    assert cancel.main(["--now", run.id]) == 0
    assert f"job {run.id}" in capsys.readouterr().out
    run.cluster.wait(run.id, state="CANCELLED", within_s=60)


def test_what_the_cluster_cannot_give_is_refused_before_it_is_submitted(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster.enter(monkeypatch)
    monkeypatch.chdir(tmp_path)
    expected = {
        ("--partition", "fast"): "--partition fast: there is none of that name; there are low",
        ("--gpus-per-node", "9"): "--gpus-per-node 9: a node of partition low has 4",
        ("--nodes", "5"): "--nodes 5: partition low has 2",
        ("--partition", "short", "--time", "2-0"): "--time 2-0: partition short allows",
        ("--account", "nobody", "--sbatch", "gres=tpu:1"): "sbatch:",
    }
    for words, message in expected.items():
        assert slurm_main([*words, "--no-snapshot", PACED, "--run-dir", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
    assert slurm_main([PACED, "--run-dir", "/proc/run"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pkl"))
    assert cluster.run("squeue", "--noheader") == ""


def test_a_python_that_is_not_there_is_named(trained: Trained) -> None:
    run = trained(*SHORT, slurm=["--python", "/opt/no/python"])
    run.ended("FAILED")
    assert run.cluster.facts(run.id)["ExitCode"] == "127:0"
    assert "/opt/no/python is not there on" in run.log


def test_a_recipe_that_is_not_there_any_more_is_named(trained: Trained, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    shutil.copy(PACED, recipe)
    run = trained(
        *SHORT, recipe=str(recipe), slurm=["--nproc-per-node", "1", "--setup", f"rm {recipe}"]
    )
    run.ended("FAILED")
    assert run.cluster.facts(run.id)["ExitCode"] == "2:0"
    assert f"{recipe}: no such file" in run.said(0, "err")


def test_a_python_that_one_node_lacks_is_named_with_the_node(
    trained: Trained, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    hides = f"""srun() {{ rm -f {python}; command srun "$@"; }}"""  # after the script's own look, before the tasks'
    run = trained(
        *SHORT,
        slurm=["--python", str(python), "--setup", hides, "--nodes", "2", "--nproc-per-node", "1"],
    )
    run.ended("FAILED")
    assert run.cluster.facts(run.id)["ExitCode"] == "127:0"
    # srun ends the other task at the first one's exit code, perhaps before it has said so
    told = []
    for task in (0, 1):
        words = f"{python} is not there on n{task}: type --python"
        told.append(words in run.said(task, "err"))
    assert any(told)


def test_a_job_submitted_from_a_job_is_none_of_its_own(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.enter(monkeypatch)
    words = [
        sys.executable,
        "-m",
        "ddp_kit.launch.slurm.submit",
        "--nproc-per-node",
        "2",
        "--no-snapshot",
        "--setup",
        "env > env.txt; exit 0",
        PACED,
    ]
    done = cluster.run(
        "srun",
        "-n1",
        "--mem-per-cpu=10",
        *words,
        "--run-dir",
        str(tmp_path / "run"),
        PYTHONPATH=str(ROOT),
        RANK="3",
    )
    job = done.split()[1].rstrip(":")
    cluster.wait(job, state="FAILED")  # nothing has run
    found = dict(
        line.split("=", 1)
        for line in (cluster.folder / "env.txt").read_text().splitlines()
        if "=" in line
    )
    assert found["SLURM_JOB_ID"] == job
    assert "SLURM_MEM_PER_CPU" not in found
    assert "RANK" not in found


def test_a_wrong_flag_of_the_recipe_ends_the_job_with_2(trained: Trained) -> None:
    run = trained("--lerning-rate", "1")
    run.ended("FAILED")
    assert run.cluster.facts(run.id)["ExitCode"] == "2:0"
    assert "--lerning-rate is not a flag" in run.said(0, "err")
