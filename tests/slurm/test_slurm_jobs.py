"""Batch jobs on a real SLURM: what is submitted, how it ends, and that it comes back."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import Cluster
from paths import KIT, ROOT
from slurm_jobs import PACED, Submitted, train
from users_folders import make_users_folder

from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.runs import cancel, jobs, logs, resubmit, sweep
from ddp_kit.launch.runs.found import FoundRun
from ddp_kit.launch.slurm.script import render
from ddp_kit.launch.slurm.submit import main as slurm_main
from ddp_kit.launch.slurm.submit import planned

LONG = ("--max-steps", "400", "--pace-s", "0.2")
SHORT = ("--max-steps", "3")
Trained = Callable[..., Submitted]


@pytest.fixture
def trained(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Submits runs to the cluster from the test's own process."""
    cluster.enter(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return lambda *flags, name="run", **more: train(
        cluster, tmp_path / "runs" / name, *flags, **more
    )


def pids(run: Submitted, word: str, *, but: str = "\0") -> list[int]:
    """The processes on the cluster whose command line has a word, and not another one."""
    return [
        int(line.split()[1])
        for line in run.cluster.control("ps").splitlines()
        if word in line and but not in line
    ]


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


def test_a_queued_job_runs_the_code_as_it_was_submitted_and_its_result_is_submitits(
    trained: Trained, tmp_path: Path
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in ("paced.py", "cases.py"):
        shutil.copy(KIT / name, project)
    shutil.copytree(
        ROOT / "ddp_kit", project / "ddp_kit", ignore=shutil.ignore_patterns("__pycache__")
    )
    for words in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "x"],
    ):
        subprocess.run(["git", "-C", str(project), *words], check=True)
    os.chdir(project)
    made = planned(
        [
            "--nproc-per-node",
            "2",
            "--sbatch",
            "begin=now+3",
            "--env",
            "OMP_NUM_THREADS=1",
            "paced.py",
            *SHORT,
            "--run-dir",
            "../runs/run",
        ]
    )[0]
    from ddp_kit.launch.slurm.submit import submit

    job = submit(made)
    (project / "paced.py").write_text("raise SystemExit('edited while it was queued')\n")
    (project / "ddp_kit" / "train.py").write_text(
        "raise SystemExit('edited while it was queued')\n"
    )
    results = job.results()
    assert [json.loads(result)["status"] for result in results] == ["finished", "finished"]
    assert json.loads((tmp_path / "runs" / "run" / "settings.json").read_text())[
        "recipe"
    ].startswith(str(tmp_path / "runs" / "run" / "code"))


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


def test_a_warning_leads_to_a_save_a_requeue_and_a_life_that_goes_on(trained: Trained) -> None:
    run = trained("--max-steps", "60", "--pace-s", "0.1")
    run.until_step(4)
    run.cluster.run("scancel", "--signal=USR1", run.id)
    run.until(lambda: "nothing lost: requeued" in run.log)
    assert run.status["status"] == "preempted"
    assert run.status["exit_code"] == 75
    saved = run.status["step"]
    run.ended()
    assert run.status["status"] == "finished"
    assert run.status["step"] == 60
    starts = [
        (event["event"], event["step"])
        for event in run.lines("events.jsonl")
        if event["event"] in ("start", "resume")
    ]
    assert starts == [("start", 0), ("resume", saved)]
    steps = [record["step"] for record in run.lines("metrics.jsonl") if record["kind"] == "train"]
    assert steps == list(range(1, 61))  # nothing lost, nothing twice
    assert "life 0 of job" in run.log
    assert "life 1 of job" in run.log


def test_cancelling_saves_first_and_nothing_is_left(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(*LONG)
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
        *SHORT, recipe=str(recipe), slurm=["--nproc-per-node", "1", "--sbatch", "begin=now+3"]
    )
    recipe.unlink()
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
    assert f"{python} is not there on n1: type --python" in run.said(1, "err")


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


@pytest.mark.parametrize(("launch", "flags"), [("launch.py", []), ("launch", ["--no-snapshot"])])
def test_a_job_beside_a_users_own_launch_recipes_and_tests(
    launch: str, flags: list[str], cluster: Cluster, tmp_path: Path
) -> None:
    """From `ddp-kit slurm`, typed in that folder, to the ranks, which submitit unpickles there."""
    folder = make_users_folder(tmp_path / "mine", launch=launch)
    own = ["--nproc-per-node", "2", "--env", "OMP_NUM_THREADS=1", *flags]
    words = [*own, "recipe.py", "--max-steps", "2", "--run-dir", "run"]
    submitted = subprocess.run(
        [Path(sys.executable).with_name("ddp-kit"), "slurm", *words],
        cwd=folder,
        env=cluster.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.split()[1].rstrip(":")
    cluster.wait(job, state="COMPLETED", within_s=90)
    assert FoundRun(folder / "run").status["status"] == "finished"
    assert FoundRun(folder / "run").status["step"] == 2


def test_a_wrong_flag_of_the_recipe_ends_the_job_with_2(trained: Trained) -> None:
    run = trained("--lerning-rate", "1", slurm=["--nproc-per-node", "4"])
    run.ended("FAILED")
    assert run.cluster.facts(run.id)["ExitCode"] == "2:0"
    assert "--lerning-rate is not a flag" in run.said(0, "err")


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_with_its_signal(trained: Trained) -> None:
    run = trained(*LONG)
    run.until_step(3)
    os.kill(pids(run, "_submit", but="srun")[-1], 9)
    run.ended("FAILED")
    assert run.cluster.facts(run.id)["ExitCode"] == "137:0"
    assert run.status["status"] == "failed"
    assert not (run.folder / "requeue").exists()


@pytest.mark.slow
def test_a_preemption_with_nothing_but_sigterm_loses_nothing(trained: Trained) -> None:
    run = trained(
        "--max-steps", "100", "--pace-s", "0.1", slurm=["--nodes", "2", "--sbatch", "exclusive"]
    )
    run.until_step(5)
    other = run.cluster.submit(
        "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 4"
    )
    run.until(lambda: run.status.get("status") == "preempted")
    run.cluster.wait(other, state="COMPLETED", within_s=30)
    run.ended()
    steps = [record["step"] for record in run.lines("metrics.jsonl") if record["kind"] == "train"]
    assert steps == list(range(1, 101))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_preemption_before_the_first_step_is_no_failure(trained: Trained, launcher: str) -> None:
    slurm = [
        "--nodes",
        "2",
        "--nproc-per-node",
        "1",
        "--launcher",
        launcher,
        "--sbatch",
        "exclusive",
    ]
    run = trained(*SHORT, "--starts-s", "30", slurm=slurm)
    run.until(lambda: (run.folder / "begins-0").exists())
    other = run.cluster.submit(
        "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    run.cluster.wait(other, state="COMPLETED", within_s=30)
    run.ended(within_s=120)
    assert run.status["status"] == "finished"
    assert (run.folder / "begins-1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_rank_that_dies_before_the_first_step_is_one(trained: Trained, launcher: str) -> None:
    run = trained(*SHORT, "--starts-s", "30", slurm=["--launcher", launcher])
    run.until(lambda: (run.folder / "begins-0").exists())
    os.kill(
        pids(
            run,
            "ddp_kit.train" if launcher == "torchrun" else "_submit",
            but="torch.distributed.run",
        )[-1],
        9,
    )
    run.ended("FAILED")
    assert not (run.folder / "begins-1").exists()


@pytest.mark.slow
def test_scancel_leaves_nothing_and_is_no_reason_to_requeue(trained: Trained) -> None:
    run = trained(*LONG, slurm=["--nodes", "2"])
    run.until_step(3)
    run.cluster.run("scancel", run.id)
    run.ended("CANCELLED")
    assert run.status["status"] == "preempted"
    assert "SLURM itself ends or requeues the job" in run.log


@pytest.mark.slow
def test_a_warning_that_comes_before_training_requeues_the_job_too(trained: Trained) -> None:
    run = trained(*SHORT)
    run.until(lambda: "Loading pickle" in run.said(1))
    run.until(
        lambda: (
            run.cluster.tried("scancel", "--signal=USR1", run.id)
            and "nothing lost: requeued" in run.log
        )
    )
    run.ended()
    assert run.status["status"] == "finished"


@pytest.mark.slow
def test_the_real_time_limit_is_met_with_a_save(trained: Trained) -> None:
    run = trained(*LONG, slurm=["--time", "1", "--warn-s", "30", "--max-requeues", "1"])
    run.until(lambda: "nothing lost: requeued" in run.log, within_s=90)
    run.until(lambda: "life 1 of job" in run.log)
    assert cancel.main([run.id]) == 0
    run.ended()


@pytest.mark.slow
def test_the_budget_of_requeues_ends_the_run(trained: Trained) -> None:
    run = trained(*LONG, slurm=["--max-requeues", "1"])
    run.until_step(3)
    run.cluster.run("scancel", "--signal=USR1", run.id)
    run.until(lambda: any(event["event"] == "resume" for event in run.lines("events.jsonl")))
    run.until_step(run.status["step"] + 3)
    run.cluster.run("scancel", "--signal=USR1", run.id)
    run.ended("FAILED")
    assert "--max-requeues 1 is reached. To go on: ddp-kit resubmit" in run.log


SAVING = ("--max-steps", "150", "--pace-s", "0.1", "--save-every", "10")


def resumed_at(run: Submitted) -> list[int]:
    return [event["step"] for event in run.lines("events.jsonl") if event["event"] == "resume"]


@pytest.mark.slow
def test_a_node_that_is_taken_down_costs_nothing(trained: Trained) -> None:
    run = trained(*SAVING, slurm=["--nodes", "2", "--sbatch", "exclusive"])
    run.until_step(25)
    run.cluster.run("scontrol", "update", "nodename=n1", "state=down", "reason=test")
    run.until(lambda: run.cluster.facts(run.id)["Restarts"] == "1", within_s=90)
    run.cluster.tried(
        "scontrol", "update", "nodename=n1", "state=resume"
    )  # it may have come back by itself
    run.ended(within_s=120)
    assert run.status["status"] == "finished"
    assert resumed_at(run)[0] >= 20


@pytest.mark.slow
def test_a_killed_node_costs_the_steps_since_the_last_save(trained: Trained) -> None:
    run = trained(*SAVING, slurm=["--sbatch", "exclusive"])
    run.until_step(25)
    node = run.cluster.facts(run.id)["NodeList"]
    run.cluster.control("kill-node", node)
    run.until(lambda: run.cluster.facts(run.id)["Restarts"] == "1", within_s=90)
    run.ended(within_s=120)
    assert run.cluster.facts(run.id)["NodeList"] != node
    assert run.status["status"] == "finished"
    assert resumed_at(run)[0] in (20, 30)
    run.cluster.control("start-node", node)
    run.cluster.wait_node(node, state="idle", within_s=60)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_an_agent_on_each_node_trains_saves_and_comes_back(trained: Trained, launcher: str) -> None:
    run = trained(
        "--max-steps",
        "80",
        "--pace-s",
        "0.1",
        slurm=["--nodes", "2", "--nproc-per-node", "1", "--launcher", launcher],
    )
    run.until_step(5, within_s=120)
    run.cluster.run("scancel", "--signal=USR1", run.id)
    run.until(lambda: "nothing lost: requeued" in run.log)
    run.ended(within_s=150)
    steps = [record["step"] for record in run.lines("metrics.jsonl") if record["kind"] == "train"]
    assert steps == list(range(1, 81))
    assert json.loads((run.folder / "env.json").read_text())["topology"]["world_size"] == 2


ELASTIC = (
    "--nodes",
    "2",
    "--nproc-per-node",
    "1",
    "--launcher",
    "torchrun",
    "--min-nodes",
    "1",
    "--sbatch",
    "exclusive",
)


@pytest.mark.slow
def test_the_agents_that_are_left_go_on_without_a_node_that_died(trained: Trained) -> None:
    flags = ("--max-steps", "150", "--save-every", "10", "--exact")
    whole = trained(*flags, name="whole")
    whole.ended()
    run = trained(*flags, "--pace-s", "0.1", slurm=ELASTIC)
    run.until_step(25, within_s=120)
    run.cluster.control("kill-node", "n1")
    run.ended(within_s=200)
    run.cluster.control("start-node", "n1")
    run.cluster.wait_node("n1", state="idle", within_s=60)
    assert run.cluster.facts(run.id)["Restarts"] == "0"
    assert resumed_at(run)[0] in (20, 30)
    log = (run.folder / "logs" / "rank-0.log").read_text()
    said = [
        log.index(words)
        for words in (" world_size=2", "a peer is gone", " world_size=1", "resumed at step")
    ]
    assert said == sorted(said)
    assert json.loads((run.folder / "env.json").read_text())["topology"]["world_size"] == 1
    assert run.status["weights_sha256"] == whole.status["weights_sha256"]
    losses = [
        {
            record["step"]: record["loss"]
            for record in each.lines("metrics.jsonl")
            if record["kind"] == "train"
        }
        for each in (whole, run)
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_the_loss_of_the_node_with_the_batch_script_brings_the_job_back(trained: Trained) -> None:
    run = trained("--max-steps", "150", "--pace-s", "0.1", "--save-every", "10", slurm=ELASTIC)
    run.until_step(25, within_s=120)
    run.cluster.control("kill-node", "n0")
    run.until(lambda: run.cluster.facts(run.id)["Restarts"] == "1", within_s=150)
    run.cluster.control("start-node", "n0")
    run.ended(within_s=200)
    assert run.status["status"] == "finished"
    assert resumed_at(run)[0] in (20, 30)
    assert "n0 is lost, and with it the batch script" in run.said(1)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_inside_the_job(trained: Trained) -> None:
    slurm = [
        "--nodes",
        "2",
        "--nproc-per-node",
        "1",
        "--launcher",
        "torchrun",
        "--max-restarts",
        "1",
    ]
    run = trained("--max-steps", "150", "--pace-s", "0.1", "--save-every", "5", slurm=slurm)
    run.until_step(8, within_s=120)
    ranks = pids(run, "ddp_kit.train", but="torch.distributed.run")
    os.kill(ranks[-1], 9)
    run.ended(within_s=180)
    assert run.status["status"] == "finished"
    assert run.cluster.facts(run.id)["Restarts"] == "0"


@pytest.mark.slow
def test_a_killed_agent_leaves_no_orphans_its_ranks_save_and_the_job_comes_back(
    trained: Trained,
) -> None:
    run = trained(
        "--max-steps",
        "100",
        "--pace-s",
        "0.1",
        slurm=["--nodes", "2", "--nproc-per-node", "1", "--launcher", "torchrun"],
    )
    run.until_step(5, within_s=120)
    os.kill(pids(run, "torch.distributed.run")[-1], 9)
    run.until(lambda: "nothing lost: requeued" in run.log, within_s=90)
    run.ended(within_s=150)
    assert [
        record["step"] for record in run.lines("metrics.jsonl") if record["kind"] == "train"
    ] == list(range(1, 101))


@pytest.mark.slow
def test_a_node_whose_network_is_cut_is_left_and_the_run_comes_back(trained: Trained) -> None:
    run = trained(
        "--max-steps",
        "200",
        "--pace-s",
        "0.1",
        "--save-every",
        "10",
        slurm=["--nodes", "2", "--nproc-per-node", "1"],
    )
    run.until_step(15)
    run.cluster.control("cut", "n1")
    run.until(lambda: run.cluster.facts(run.id)["Restarts"] == "1", within_s=150)
    run.cluster.control("join", "n1")
    run.ended(within_s=200)
    assert run.status["status"] == "finished"
    assert resumed_at(run)[0] >= 10


@pytest.mark.slow
def test_two_jobs_share_a_node_without_meeting(trained: Trained) -> None:
    runs = [
        trained(
            "--max-steps",
            "20",
            name=name,
            slurm=["--gpus-per-node", "2", "--sbatch", "nodelist=n0"],
        )
        for name in ("a", "b")
    ]
    for run in runs:
        run.ended(within_s=120)
    assert runs[0].status["weights_sha256"] == runs[1].status["weights_sha256"]


@pytest.mark.slow
def test_resubmitting_goes_on_at_another_size(trained: Trained) -> None:
    run = trained(*LONG)
    run.until_step(3)
    assert cancel.main([run.id]) == 0
    run.ended()
    saved = run.status["step"]
    assert (
        resubmit.main(
            [
                str(run.folder),
                "--nproc-per-node",
                "4",
                "--",
                "--max-steps",
                str(saved + 5),
                "--change",
                "max_steps",
            ]
        )
        == 0
    )
    run.cluster.wait(FoundRun(run.folder).submissions()[-1]["job"], state="COMPLETED", within_s=90)
    assert run.status["status"] == "finished"
    assert run.status["step"] == saved + 5
    assert json.loads((run.folder / "env.json").read_text())["topology"]["world_size"] == 4


@pytest.mark.slow
def test_a_sweep_is_one_array_and_one_failing_point_is_its_own_affair(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    cluster.enter(monkeypatch)
    monkeypatch.chdir(tmp_path)
    common = [
        "--env",
        f"PYTHONPATH={ROOT}:{KIT}",
        "--env",
        "OMP_NUM_THREADS=1",
        "--no-snapshot",
        "--parallel",
        "2",
        "--name",
        "mine",
    ]
    assert (
        sweep.main(
            [
                "--grid",
                "fails-at=-1,2",
                "--grid",
                "lr=0.1,0.2",
                "--nproc-per-node",
                "2",
                *common,
                PACED,
                *SHORT,
            ]
        )
        == 0
    )
    array = capfd.readouterr().out.split()[1].rstrip(",")
    end = time.monotonic() + 150
    while (
        left := cluster.run("squeue", "--noheader", "--array", f"--jobs={array}")
    ) and time.monotonic() < end:
        time.sleep(0.5)
    assert not left
    home = tmp_path / "runs" / "mine"
    found = {
        path.parent.name: json.loads(path.read_text())["status"]
        for path in home.glob("*/status.json")
    }
    assert found == {
        f"fails-at={at},lr={lr}": "failed" if at == 2 else "finished"
        for at in (-1, 2)
        for lr in (0.1, 0.2)
    }
    assert sweep.main(["--show", "mine"]) == 0
    shown = capfd.readouterr().out
    assert "fails-at" in shown
    assert "failed" in shown
    with pytest.raises(LaunchError, match="nothing of it waits or runs"):
        cancel.cancel(FoundRun(home / "fails-at=-1,lr=0.1"), now=True)


@pytest.mark.slow
def test_three_lives_end_with_the_weights_of_the_run_that_was_never_stopped(
    trained: Trained,
) -> None:
    flags = ("--max-steps", "120", "--pace-s", "0.1", "--exact", "--save-every", "10")
    two = ["--nodes", "2", "--nproc-per-node", "1", "--sbatch", "exclusive"]
    whole = trained("--max-steps", "120", "--exact", "--save-every", "10", name="whole")
    whole.ended()
    run = trained(*flags, name="stopped", slurm=two)
    run.until_step(10)
    run.cluster.run("scancel", "--signal=USR1", run.id)  # as the time limit's warning does
    run.until(
        lambda: (
            len([event for event in run.lines("events.jsonl") if event["event"] == "resume"]) == 1
        ),
        within_s=90,
    )
    run.until_step(run.status["step"] + 15)
    other = run.cluster.submit(
        "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"
    )
    run.cluster.wait(other, state="COMPLETED", within_s=60)
    run.until(
        lambda: (
            len([event for event in run.lines("events.jsonl") if event["event"] == "resume"]) == 2
        ),
        within_s=90,
    )
    run.until_step(75)
    run.cluster.control("kill-node", "n1")
    run.until(lambda: run.cluster.facts(run.id)["Restarts"] == "3", within_s=90)
    run.cluster.control("start-node", "n1")
    run.ended(within_s=180)
    assert run.status["weights_sha256"] == whole.status["weights_sha256"]
