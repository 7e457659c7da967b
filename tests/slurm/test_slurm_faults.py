"""Batch jobs on a real SLURM that lose a rank, a node, their time or their place, and come back."""

import json
import os
import time
from pathlib import Path

import pytest
from clusters import Cluster
from paths import KIT, ROOT
from slurm_jobs import LONG, PACED, SHORT, Submitted, Trained, pids

from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.runs import cancel, resubmit, sweep
from ddp_kit.launch.runs.found import FoundRun


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
