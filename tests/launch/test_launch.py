"""The launcher of our own: real ranks, real signals, and the exit code of the one that failed."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from paths import KIT, ROOT
from warm import LAUNCHER, LIMIT_S, Started, started

from ddp_kit.io.cgroup import MemoryKills
from ddp_kit.launch.environment import visible_gpus
from ddp_kit.launch.local import processes, torchrun
from ddp_kit.launch.local.processes import PEERS_S
from ddp_kit.launch.plan import LaunchError, Plan, processes_of
from ddp_kit.launch.runs import cancel

DIGITS = str(ROOT / "recipes" / "digits.py")
PACED = str(KIT / "paced.py")
LONG = ("--max-steps", "100000", "--pace-s", "0.02")


def launcher(
    folder: Path, *flags: str, recipe: str = PACED, **surroundings: Any
) -> AbstractContextManager[Started]:
    """`ddp-kit run` of 2 ranks."""
    words = ["--nproc-per-node", "2", recipe, *flags, "--run-dir", str(folder / "run")]
    return started(LAUNCHER, *words, folder=folder, env={"EVERY_STEP": "1"}, **surroundings)


def status(folder: Path) -> Any:
    return json.loads((folder / "run" / "status.json").read_text())


def has_saved(folder: Path) -> bool:
    """Whether there is a checkpoint of the last step."""
    return (folder / "run" / "checkpoints" / f"step-{status(folder)['step']:08d}").is_dir()


def are_gone(pids: list[int], *, within_s: float) -> bool:
    end = time.monotonic() + within_s
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_our_own_launcher_imports_nothing_that_ranks_would_wait_for() -> None:
    code = "import ddp_kit.launch.local.run, sys; print([name for name in ('torch', 'numpy', 'tyro') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_plan_says_all_faults_at_once_and_what_to_type() -> None:
    with pytest.raises(
        LaunchError,
        match=r"no_such\.py is not there \(looked in .*\); --nproc-per-node 0: expected 1 or more",
    ):
        Plan(words=("no_such.py",), processes=0)
    with pytest.raises(
        LaunchError,
        match="--lr is no flag of the launcher, and the recipe comes before its own flags",
    ):
        Plan(words=("--lr", "1"))
    folder, name = Path(DIGITS).parent, Path(DIGITS).stem
    for word, fault in {
        f"{folder / name}": f"{name} is not there .*Did you mean {folder / name}.py\\?",
        f"{folder}": "recipes is not there",
        f"{folder.parent / 'README.md'}": r"README\.md: expected a \.py file",
        "no recipe": "no recipe: expected a recipe's .py file, or the dotted name of a module",
    }.items():
        with pytest.raises(LaunchError, match=fault):
            Plan(words=(word,))
    assert Plan(words=("package.module",)).words == ("package.module",)
    with pytest.raises(LaunchError, match="expected a number or auto"):
        processes_of("many", gpus=1)


def test_auto_is_one_rank_for_each_visible_gpu(tmp_path: Path) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    assert visible_gpus(environ={}, driver=tmp_path / "gpus") == 2
    assert visible_gpus(environ={"CUDA_VISIBLE_DEVICES": "0,3,5"}, driver=tmp_path / "gpus") == 3
    assert visible_gpus(environ={"CUDA_VISIBLE_DEVICES": ""}, driver=tmp_path / "gpus") == 0
    assert visible_gpus(environ={}, driver=tmp_path / "none") == 0
    assert [processes_of("auto", gpus=gpus) for gpus in (0, 1, 3)] == [1, 1, 3]


@pytest.mark.parametrize(
    ("agent", "code"),
    [
        (
            """echo '{"status": "failed", "exit_code": 124}' > new; mv new status.json; exit 1""",
            124,
        ),
        (
            """echo '{"status": "running", "exit_code": null}' > new; mv new status.json; exit 1""",
            1,
        ),
        ("exit 1", 1),  # the status is an earlier life's
        ("touch requeue; exit 1", 75),
        ("exit 3", 3),
        ("kill -9 $$", 137),
    ],
)
def test_an_agents_task_ends_with_the_code_of_its_ranks(
    agent: str, code: int, tmp_path: Path
) -> None:
    (tmp_path / "status.json").write_text('{"status": "failed", "exit_code": 130}')
    task = [
        "-c",
        "import sys; from ddp_kit.launch.slurm.task import agent; agent(*sys.argv[1:])",
        str(tmp_path),
        "sh",
        "-c",
        agent,
        "--",
    ]
    facts = {
        "SLURM_JOB_ID": "17",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "DDP_KIT_HOSTS": "n0",
        "SUBMITIT_EXECUTOR": "slurm",
    }
    environ = os.environ | facts | {"SUBMITIT_FOLDER": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *task],
        env=environ,
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    first = tmp_path / "17.0.failed"
    assert (first.read_text() if first.exists() else "") == ("" if code == 75 else f"{code}\n")


@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_ranks_inside_a_batch_job_know_their_job_but_not_its_ranks(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What names the run directory, counts lives, asks for the requeue and sets the time limit is the job's; ranks are this launcher's."""
    job = {
        "SLURM_CLUSTER_NAME": "c",
        "SLURM_JOB_ID": "17",
        "SLURM_ARRAY_JOB_ID": "16",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_RESTART_COUNT": "2",
    }
    job |= {"SLURM_JOB_END_TIME": "99", "DDP_KIT_REQUEUE": "1", "DDP_KIT_GRACE_S": "120"}
    foreign = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "5",
        "SLURM_NTASKS": "8",
        "SLURM_STEP_ID": "0",
        "TORCHELASTIC_RUN_ID": "x",
    }
    for name, value in {**job, **foreign}.items():
        monkeypatch.setenv(name, value)
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nenv > {tmp_path}/env.txt\n")
    program.chmod(0o755)
    plan = Plan(words=(DIGITS,), python=str(program))
    if launcher == "local":
        assert processes.run(plan) == 0
    else:
        monkeypatch.setattr(
            signal, "signal", lambda number, handler: None
        )  # pytest's own process goes on
        monkeypatch.setattr(
            os,
            "execve",
            lambda path, words, environ: subprocess.run(words, env=environ, check=True),
        )
        torchrun.run(plan)
    found = dict(
        line.split("=", 1)
        for line in (tmp_path / "env.txt").read_text().splitlines()
        if "=" in line
    )
    assert {name: found.get(name) for name in job} == job
    assert not set(foreign) & set(found)


def test_an_agent_of_torchrun_that_we_have_become_outlives_the_warnings() -> None:
    code = "from ddp_kit.launch.environment import become; become(['/bin/sh', '-c', 'kill -USR1 $$; kill -USR2 $$; exit 7'])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 7


def test_two_ranks_train_to_the_end_and_nothing_is_left(tmp_path: Path) -> None:
    with launcher(tmp_path, "--max-steps", "4") as run:
        run.says("batch: 8 global = 2 ranks")
        ranks = run.children
        assert len(ranks) == 2
        assert run.ended() == 0, run.output
    assert status(tmp_path)["status"] == "finished"
    assert are_gone(ranks, within_s=0)
    assert "ddp-kit run" in (tmp_path / "run" / "env.json").read_text()


@pytest.mark.slow
@pytest.mark.steady
@pytest.mark.parametrize("name", ["torchrun", "accelerate"])
def test_every_launcher_gives_the_same_weights(name: str, tmp_path: Path) -> None:
    digests = []
    for launcher_name in ("local", name):
        run_dir = tmp_path / launcher_name
        words = ["--nproc-per-node", "2", "--launcher", launcher_name, PACED, "--max-steps", "4"]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "ddp_kit.launch.local.run",
                *words,
                "--exact",
                "--run-dir",
                run_dir,
            ],
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{KIT}", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=2 * LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        digests.append(json.loads((run_dir / "status.json").read_text())["weights_sha256"])
    assert digests[0] == digests[1]


def test_usage_errors_are_said_once_and_end_with_2(tmp_path: Path) -> None:
    with launcher(tmp_path, "--lerning-rate", "1") as run:
        assert run.ended() == 2
    assert run.output.count("--lerning-rate is not a flag") == 1


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGTERM, 143, "preempted"),
        (signal.SIGINT, 130, "stopped"),
        (signal.SIGHUP, 143, "preempted"),
    ],
)
def test_a_signal_to_the_launcher_stops_all_ranks_after_a_save(
    number: int, code: int, word: str, tmp_path: Path
) -> None:
    with launcher(tmp_path, *LONG) as run:
        run.says("step 3/")
        ranks = run.children
        run.send(number)
        assert run.ended() == code, run.output
    assert status(tmp_path)["status"] == word
    assert has_saved(tmp_path)
    assert are_gone(ranks, within_s=0)


def test_cancelling_at_once_waits_for_no_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with launcher(tmp_path, "--max-steps", "100", "--pace-s", "60", patience_s=0.5) as run:
        run.says("step 1 is done")
        ranks = run.children
        assert cancel.main(["--now", str(tmp_path / "run")]) == 0
        assert "ended; the newest checkpoint is kept" in capsys.readouterr().out
        assert run.ended() != 0
    assert are_gone(ranks, within_s=0)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_killed_rank_ends_the_others_and_its_signal_is_the_exit_code(tmp_path: Path) -> None:
    with launcher(tmp_path, *LONG) as run:
        run.says("step 3/")
        ranks = run.children
        os.kill(ranks[1], signal.SIGKILL)
        begin = time.monotonic()
        assert run.ended() == 128 + signal.SIGKILL
        assert time.monotonic() - begin < PEERS_S
    assert "rank 1 was ended by SIGKILL" in run.output
    assert status(tmp_path)["status"] == "failed"
    assert are_gone(ranks, within_s=0)


SLEEPER = """\
import os, sys, time

from ddp_kit.lifecycle import session

session.OTHERS_SPEAK_S = 0.5
if os.environ["RANK"] == "1":
    {ending}
time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("ending", "code"), [("sys.exit(3)", 3), ("raise ValueError('a fault of its own')", 2)]
)
def test_a_rank_that_fails_while_a_lower_one_lives_ends_the_run_with_its_own_code(
    ending: str, code: int, tmp_path: Path
) -> None:
    recipe = tmp_path / "sleeper.py"
    recipe.write_text(SLEEPER.format(ending=ending))
    with launcher(tmp_path, recipe=str(recipe), patience_s=0.5) as run:
        assert run.ended() == code, run.output


def test_the_first_failure_is_named_and_of_those_found_at_once_the_one_by_a_signal() -> None:
    def ranks_of(*programs: str) -> "list[subprocess.Popen[bytes]]":
        return [subprocess.Popen(["sh", "-c", program]) for program in programs]

    later = ranks_of("sleep 0.5; kill -ABRT $$", "exit 3")
    assert processes._watch(later, memory=MemoryKills()) == (1, 3)
    at_once = ranks_of("exit 3", "kill -KILL $$")
    for rank in at_once:
        rank.wait()
    assert processes._watch(at_once, memory=MemoryKills()) == (1, -signal.SIGKILL)


@pytest.mark.parametrize("terminal", ["full", "closed"])
def test_a_terminal_that_takes_no_line_costs_no_exit_code(terminal: str, tmp_path: Path) -> None:
    """The launcher has a line to say of a rank that was killed, and nobody can read it."""
    rank = tmp_path / "rank"
    rank.write_text("#!/bin/sh\nkill -9 $$\n")
    rank.chmod(0o755)
    code = "import sys; from ddp_kit.launch.local import processes; from ddp_kit.launch.plan import Plan; "
    code += f"sys.exit(processes.run(Plan(words=({DIGITS!r},), python={str(rank)!r})))"
    redirected = {"full": ">/dev/full 2>/dev/full", "closed": ">&- 2>&-"}[terminal]
    words = ["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, check=False, timeout=LIMIT_S)
    assert done.returncode == 128 + signal.SIGKILL


def test_ranks_whose_launcher_is_killed_save_and_leave(tmp_path: Path) -> None:
    with launcher(tmp_path, *LONG) as run:
        run.says("step 3/")
        ranks = run.children
        run.send(signal.SIGKILL)
        assert are_gone(ranks, within_s=20)
    assert status(tmp_path)["status"] == "preempted"
    assert has_saved(tmp_path)
