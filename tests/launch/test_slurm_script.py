"""The batch script of a plan, and the plan as the run directory keeps it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_plans import plan

from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.slurm.plan import SlurmPlan
from ddp_kit.launch.slurm.planning import planned
from ddp_kit.launch.slurm.script import render, variables

pytestmark = pytest.mark.usefixtures("in_a_project")


def test_the_script_keeps_what_was_met_by_trying() -> None:
    text = render(
        plan(
            "--nodes",
            "2",
            "--gpus-per-node",
            "4",
            "--time",
            "1:00:00",
            "--env-preset",
            "nccl-debug",
            "--env",
            "NCCL_DEBUG=WARN",
        )
    )
    for line in (
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --requeue",
        "--kill-on-bad-exit=1",
        "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK",
        "export DDP_KIT_REQUEUE=1",
        "export NCCL_DEBUG=WARN",
        'exit "$ddp_kit_rc"',
    ):
        assert line in text, line
    agent = render(plan("--launcher", "torchrun", "--nproc-per-node", "4", "--cpus-per-task", "2"))
    assert "#SBATCH --ntasks-per-node=1" in agent
    assert "#SBATCH --cpus-per-task=8" in agent
    assert "#SBATCH --no-requeue" in render(plan("--max-requeues", "0"))
    assert "container-image" not in render(plan()).split("srun")[0]
    contained = render(plan("--container-image", "a b.sqsh"))
    assert "--container-image='a b.sqsh'" in contained
    assert "--container" not in contained.partition("srun")[0]
    assert subprocess.run(["bash", "-n"], input=contained, text=True, check=False).returncode == 0


def test_torchruns_agents_may_go_on_with_fewer_nodes() -> None:
    made = plan("--launcher", "torchrun", "--nodes", "4", "--min-nodes", "2")
    text = render(made)
    for line in (
        "#SBATCH --nodes=4",
        "#SBATCH --no-kill",
        "srun -n",
        "  --no-kill \\",
        "--kill-on-bad-exit=0",
        "--input=none",
    ):
        assert line in text, line
    assert "--no-kill" not in render(plan("--launcher", "torchrun", "--nodes", "4"))
    assert made.restarts == 2
    assert dataclasses.replace(made, max_restarts=5).restarts == 5
    with pytest.raises(
        LaunchError, match="--min-nodes needs --launcher torchrun: srun cannot go on without a node"
    ):
        plan("--nodes", "4", "--min-nodes", "2")
    with pytest.raises(LaunchError, match=r"--min-nodes 4: expected fewer than --nodes 4, or 0"):
        plan("--launcher", "torchrun", "--nodes", "4", "--min-nodes", "4")


def test_options_of_the_user_are_passed_on_and_win() -> None:
    text = render(
        plan(
            "--sbatch",
            "exclusive",
            "--sbatch",
            "mail-user=a b",
            "--srun",
            "cpu-bind=none",
            "--setup",
            "module load x",
        )
    )
    assert "#SBATCH --exclusive\n" in text
    assert '#SBATCH --mail-user="a b"\n' in text
    assert "--cpu-bind=none" in text.partition("srun")[2]
    assert "\nmodule load x\n" in text


def test_an_empty_variable_is_set_and_a_warning_comes_before_the_end() -> None:
    assert "\nexport A=''\n" in render(plan("--env", "A="))
    for words in (
        ["--time", "2"],
        ["--time", "1:00:00", "--sbatch", "time=2"],
        ["--time", "5", "--warn-s", "300"],
    ):
        with pytest.raises(
            LaunchError,
            match=r"--warn-s \d+: expected fewer than the \d+ seconds of --(sbatch )?time",
        ):
            plan(*words)
    for words in (
        ["--time", "3"],
        ["--time", "0"],
        ["--time", "UNLIMITED"],
        ["--sbatch", "time=x-1"],
        ["--time", "2", "--warn-s", "60"],
    ):
        assert "--signal=USR1@" in render(plan(*words))


def test_the_shells_own_choices_for_sbatch_do_not_win_over_the_scripts() -> None:
    names = variables(plan("--partition", "gpu", "--time", "10"))
    assert {
        "SBATCH_PARTITION",
        "SBATCH_TIMELIMIT",
        "SBATCH_NO_REQUEUE",
        "SBATCH_OPEN_MODE",
    } <= names
    assert "SBATCH_ACCOUNT" not in names  # not stated in the script: the user's choice holds


def test_a_refused_requeue_names_the_command_that_goes_on() -> None:
    """The script itself, with an srun that leaves what a saved run does, and a scontrol that may not requeue."""
    made = planned(
        ["--python", sys.executable, "--no-snapshot", "recipe.py", "--run-dir", "runs/a b"]
    )[0]
    run = Path(made.runs[0].folder)
    (run / "launch").mkdir(parents=True)
    Path("bin").mkdir()
    for name, line in {
        "srun": f"touch '{run}/requeue'; exit 75",
        "scontrol": 'test "$1" = show',
    }.items():
        Path("bin", name).write_text(f"#!/bin/sh\n{line}\n")
        Path("bin", name).chmod(0o755)
    environ = {
        "PATH": f"{Path('bin').absolute()}:/usr/bin:/bin",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n0",
        "SLURM_NTASKS": "1",
    }
    done = subprocess.run(
        ["bash"], input=render(made), env=environ, text=True, capture_output=True, check=False
    )
    assert done.returncode == 75, done.stderr
    command = str(run).replace(" ", "\\ ")
    assert (
        f"life 0 of job 17 has stopped with nothing lost: it could not be requeued. To go on: ddp-kit resubmit {command}\n"
        in done.stdout
    )


def test_a_setup_line_that_fails_ends_the_job() -> None:
    text = render(plan("--setup", "module load 'x y'"))
    begin = text.index("module load")
    assert (
        text[begin:]
        .splitlines()[1]
        .startswith("if [ $? -ne 0 ]; then ddp_kit_say '--setup module load")
    )
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_plan_is_read_back_as_it_was_written() -> None:
    made = plan("--nodes", "3", "--env", "A=b", "--sbatch", "exclusive")
    Path(made.runs[0].folder).mkdir(parents=True)
    assert SlurmPlan.from_json(made.to_json()) == made
    with pytest.raises(LaunchError, match="which this version of ddp_kit does not know"):
        SlurmPlan.from_json(made.to_json().replace('"nodes"', '"knots"'))


def test_a_new_line_in_any_text_never_reaches_the_script() -> None:
    made = plan()
    for field in dataclasses.fields(SlurmPlan):
        if isinstance(getattr(made, field.name), str) and field.name not in (
            "source",
            "python",
            "snapshot",
            "launcher",
        ):
            with pytest.raises(LaunchError):
                dataclasses.replace(made, **{field.name: "a\nscancel 1"})
