"""The batch scripts for people who write their own: SLURM accepts them, and a stop that was saved becomes another life."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from clusters import Cluster
from paths import KIT, ROOT

TEMPLATES = ["train", "train_accelerate"]
# In place of `python -m ddp_kit.train` and of `accelerate launch`: as ddp_kit does, it saves on a signal, rank 0 says that it has, and
# nobody leaves before rank 0.
STAND_IN = """#!{python}
import fcntl, json, os, signal, sys, time
from pathlib import Path
if sys.argv[1] == "-c":  # the script's own question
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
run = Path(sys.argv[sys.argv.index("--run-dir") + 1])
rank, life = os.environ["SLURM_PROCID"], os.environ.get("SLURM_RESTART_COUNT", "0")
turn = (run / "turn").open("a")
if rank == "0":
    fcntl.flock(turn, fcntl.LOCK_EX)
def stop(number, frame):
    if rank == "0" and os.environ["DDP_KIT_REQUEUE"] == "1":
        (run / "requeue").touch()
    while rank != "0" and not (run / "requeue").exists():
        time.sleep(0.02)
    fcntl.flock(turn, fcntl.LOCK_EX)
    os._exit(75)
is_agent = "accelerate" in sys.argv[0]
if is_agent:
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, stop)
assert life == "0" or not (run / "requeue").exists(), "an earlier life's"
(run / f"life-{{life}}-{{rank}}").write_text(" ".join(sys.argv[1:]))
print("life", life, "rank", rank, flush=True)
if "--fail" in sys.argv:
    # As ranks do, they fail once they have met: srun ends a task that is still starting by SIGTERM, and hands on the highest code.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (run / f"here-{{rank}}").touch()
    while len(list(run.glob("here-*"))) < int(os.environ["SLURM_STEP_NUM_TASKS"]):
        time.sleep(0.02)
    (run / "status.json").write_text(json.dumps({{"exit_code": 9}}))
    sys.exit(1 if is_agent else 9)
if "--save" in sys.argv and life == "0":
    stop(signal.SIGUSR1, None)
if "--vanish" in sys.argv:
    sys.exit(0)
if life == "0":
    time.sleep(1000)
(run / "status.json").write_text(json.dumps({{"status": "finished", "exit_code": 0}}))
"""


@dataclass(frozen=True, kw_only=True)
class Scripts:
    """Submits a template, with stand-ins for the programs that it starts."""

    cluster: Cluster
    folder: Path
    run_dir: Path

    def submit(self, name: str, *words: str, flags: tuple[str, ...] = ()) -> str:
        sizes = ("--ntasks-per-node=2",) if Path(name).name == "train" else ()
        own = (
            "--gpus-per-node=2",
            "--cpus-per-task=1",
            *sizes,
            f"--chdir={self.folder}",
            "--output=log",
            *flags,
        )
        variables = {} if "--array=1,2" in flags else {"RUN_DIR": str(self.run_dir)}
        variables |= {"PATH": f"{self.folder / 'bin'}:{self.cluster.environ['PATH']}"}
        return self.cluster.submit(
            *own, str(ROOT / "slurm" / f"{name}.sbatch"), *words, **variables
        )

    @property
    def lives(self) -> Mapping[str, str]:
        """What was started, by life and task."""
        return {path.name: path.read_text() for path in self.run_dir.glob("life-*")}

    def wait_for_ranks(self, job: str, *, tasks: int) -> None:
        """Waits until so many tasks of the first life handle signals."""
        end = time.monotonic() + 20
        while len(self.lives) < tasks:
            self.cluster.wait(job, state="RUNNING")
            assert time.monotonic() < end, (
                f"{sorted(self.lives)} after 20 s. {self.cluster.story(job)}"
            )

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def scripts(cluster: Cluster, tmp_path: Path) -> Scripts:
    (tmp_path / "bin").mkdir()
    for name in ("python", "accelerate"):
        (tmp_path / "bin" / name).write_text(STAND_IN.format(python=sys.executable))
        (tmp_path / "bin" / name).chmod(0o755)
    return Scripts(cluster=cluster, folder=tmp_path, run_dir=tmp_path / "run")


@pytest.mark.parametrize("name", TEMPLATES)
def test_sbatch_takes_the_template_and_its_own_flags_before_it(cluster: Cluster, name: str) -> None:
    template = str(ROOT / "slurm" / f"{name}.sbatch")
    refused = cluster.tried("sbatch", "--test-only", template, "recipe.py")
    assert refused.returncode == 1  # 8 GPUs on nodes of 4
    smaller = (
        "--gpus-per-node=4",
        "--cpus-per-task=1",
        *(["--ntasks-per-node=4"] if name == "train" else []),
    )
    taken = cluster.tried("sbatch", "--test-only", *smaller, template, "recipe.py", "--lr", "0.2")
    assert taken.returncode == 0, taken.stderr
    assert "on nodes n[0-1]" in taken.stderr


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_rank_that_fails_ends_the_job_with_its_own_exit_code(scripts: Scripts, name: str) -> None:
    job = scripts.submit(name, "recipe.py", "--note", "two words", "--fail")
    scripts.cluster.wait(job, state="FAILED")
    assert scripts.cluster.facts(job)["ExitCode"] == "9:0"
    assert all(
        "recipe.py --note two words --fail --run-dir" in life for life in scripts.lives.values()
    )
    assert not (scripts.run_dir / "requeue").exists()


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_exit_code_0_without_an_end_is_a_failure(scripts: Scripts, name: str) -> None:
    job = scripts.submit(name, "recipe.py", "--vanish")
    scripts.cluster.wait(job, state="FAILED")
    assert scripts.cluster.facts(job)["ExitCode"] == "1:0"
    assert f"job {job}: srun has ended with 0, but" in scripts.log


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_whose_own_lines_set_errexit_hands_the_exit_code_on(
    scripts: Scripts, name: str
) -> None:
    template = (ROOT / "slurm" / f"{name}.sbatch").read_text()
    line = "# source .venv/bin/activate"
    assert template.count(line) == 1
    edited = scripts.folder / f"{name}.sbatch"
    edited.write_text(template.replace(line, "set -eu; trap 'echo mine' TERM"))
    job = scripts.submit(str(edited.with_suffix("")), "recipe.py", "--save")
    scripts.cluster.wait(job, state="COMPLETED", within_s=40)
    assert scripts.cluster.facts(job)["Restarts"] == "1"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_refused_requeue_names_the_command_that_goes_on_as_one_types_it(
    name: str, tmp_path: Path
) -> None:
    run = tmp_path / "a run's $HOME"
    answers = {"srun": 'touch "$RUN_DIR/requeue"', "scontrol": 'test "$1" != requeue'}
    for program, answer in answers.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / program).chmod(0o755)
    words = ["my recipe.py", "--note", "two 'words'; $(touch x)"]
    facts = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_NODELIST": "n0",
        "SLURM_NNODES": "1",
        "RUN_DIR": str(run),
    }
    environ = {**facts, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    script = ["bash", str(ROOT / "slurm" / f"{name}.sbatch"), *words]
    done = subprocess.run(
        script, env=environ, cwd=tmp_path, text=True, capture_output=True, check=False
    )
    assert done.returncode == 75, done.stderr
    told, _, command = done.stderr.strip().partition(" To go on: ")
    assert told == "job 7 is saved, but may not be requeued here."
    typed = f"""sbatch() {{ printf '%s\\n' "$RUN_DIR" "$@"; }}; {command}"""
    again = subprocess.run(
        ["bash", "-c", typed], cwd=tmp_path, text=True, capture_output=True, check=True
    ).stdout
    assert again.splitlines() == [str(run), "[flags]", f"slurm/{name}.sbatch", *words]
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_warning_becomes_another_life_with_the_same_job_and_the_same_log(
    scripts: Scripts, name: str
) -> None:
    job = scripts.submit(name, "recipe.py")
    tasks = 4 if name == "train" else 2
    scripts.wait_for_ranks(job, tasks=tasks)
    scripts.cluster.run(
        "scancel", "--signal=USR1", job
    )  # as --signal=USR1@120 does before time is up: to the step alone
    scripts.cluster.wait(job, state="COMPLETED", within_s=30)
    assert scripts.cluster.facts(job)["Restarts"] == "1"
    assert set(scripts.lives) == {f"life-{life}-{rank}" for life in (0, 1) for rank in range(tasks)}
    assert all(f"life {life} rank 0" in scripts.log for life in (0, 1))
    if name == "train_accelerate":
        assert "--machine_rank=0 --num_processes=4" in scripts.lives["life-0-0"]
        assert "--machine_rank=1 --num_processes=4" in scripts.lives["life-0-1"]
        assert scripts.lives["life-0-0"] != scripts.lives["life-1-0"]  # the agents' port


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_cancelled_job_saves_and_stays_cancelled(scripts: Scripts, name: str) -> None:
    job = scripts.submit(name, "recipe.py")
    scripts.wait_for_ranks(job, tasks=4 if name == "train" else 2)
    scripts.cluster.run("scancel", job)
    scripts.cluster.wait(job, state="CANCELLED", within_s=30)
    assert not scripts.cluster.left()
    assert (scripts.run_dir / "requeue").exists()
    assert f"job {job} is saved. It was cancelled" in scripts.log
    assert scripts.cluster.facts(job)["Restarts"] == "0"


@pytest.mark.slow
def test_an_element_of_an_array_is_requeued_alone(scripts: Scripts) -> None:
    job = scripts.submit(
        "train", "recipe.py", flags=("--array=1,2", "--nodes=1", "--output=log-%a")
    )
    first, last = (
        replace(scripts, run_dir=scripts.folder / "runs" / f"train-{job}_{number}")
        for number in (1, 2)
    )
    first.wait_for_ranks(job, tasks=2)
    last.wait_for_ranks(job, tasks=2)
    scripts.cluster.run(
        "scancel", "--signal=USR1", f"{job}_2"
    )  # the one whose job id is the array's
    scripts.cluster.wait(f"{job}_2", state="COMPLETED", within_s=30)
    assert scripts.cluster.facts(f"{job}_2")["Restarts"] == "1"
    assert scripts.cluster.facts(f"{job}_1")["Restarts"] == "0"
    assert (set(first.lives), set(last.lives)) == (
        {"life-0-0", "life-0-1"},
        {"life-0-0", "life-0-1", "life-1-0", "life-1-1"},
    )
    scripts.cluster.run("scancel", job)


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_real_recipe_that_is_warned_goes_on_in_another_life(
    cluster: Cluster, tmp_path: Path, name: str
) -> None:
    sizes = ["--ntasks-per-node=2"] if name == "train" else []
    flags = [
        "--gpus-per-node=0",
        "--cpus-per-task=1",
        *sizes,
        f"--chdir={tmp_path}",
        "--output=log",
    ]
    path = {
        "PATH": f"{Path(sys.executable).parent}:{cluster.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{KIT}",
    }
    words = [
        str(ROOT / "slurm" / f"{name}.sbatch"),
        str(KIT / "paced.py"),
        "--max-steps",
        "60",
        "--pace-s",
        "0.25",
    ]
    metrics = tmp_path / "run" / "metrics.jsonl"
    job = cluster.submit(
        *flags,
        *words,
        RUN_DIR=str(tmp_path / "run"),
        RANKS_PER_NODE="2",
        OMP_NUM_THREADS="1",
        **path,
    )
    end = time.monotonic() + 120
    while not (metrics.exists() and '"step": 3,' in metrics.read_text()):
        assert time.monotonic() < end, cluster.story(job)
        assert cluster.state(job) in ("PENDING", "RUNNING"), cluster.story(job)
        time.sleep(0.2)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.wait(job, state="COMPLETED", within_s=240)
    assert cluster.facts(job)["Restarts"] == "1"
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "finished"
    steps = [
        record["step"]
        for record in map(json.loads, metrics.read_text().splitlines())
        if record["kind"] == "train"
    ]
    assert steps == list(range(1, 61))  # nothing lost, nothing twice
