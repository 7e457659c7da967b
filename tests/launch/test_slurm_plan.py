"""Plans, their scripts and everything else about batch jobs that needs no SLURM."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from ddp_kit.launch.environment import outside_job
from ddp_kit.launch.local import accelerate
from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.runs import cancel, jobs, logs, resubmit, sweep
from ddp_kit.launch.runs.found import FoundRun, find, is_of, runs_in
from ddp_kit.launch.slurm import cluster, snapshot
from ddp_kit.launch.slurm.plan import Run, SlurmPlan
from ddp_kit.launch.slurm.script import render, variables
from ddp_kit.launch.slurm.submit import main as slurm_main
from ddp_kit.launch.slurm.submit import parser, planned, with_recipe


@pytest.fixture(autouse=True)
def _in_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user stands in a folder with a recipe, and no SLURM is there."""
    (tmp_path / "recipe.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for module in (
        "ddp_kit.launch.slurm.cluster",
        "ddp_kit.launch.runs.found",
        "ddp_kit.launch.runs.jobs",
        "ddp_kit.launch.runs.sweep",
    ):
        monkeypatch.setattr(f"{module}.has_slurm", lambda: False, raising=False)


def git(*words: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=n", "-c", "user.email=e", *words], check=True, capture_output=True
    )


def plan(*words: str) -> SlurmPlan:
    return planned([*words, "recipe.py", "--lr", "0.2"])[0]


def test_all_faults_are_said_at_once() -> None:
    with pytest.raises(LaunchError) as error:
        numbers = ["--nodes", "0", "--max-restarts", "1"]
        texts = [
            "--mem",
            "3x",
            "--time",
            "soon",
            "--env",
            "Q",
            "--env-preset",
            "quick",
            "--setup",
            "a\nb",
        ]
        planned(
            [
                *numbers,
                *texts,
                "--sbatch",
                "output=x",
                "--srun",
                "K V",
                "no_such.py",
                "--run-dir",
                "a%j",
            ]
        )
    for part in (
        "no_such.py is not there",
        "--nodes 0: expected 1 or more",
        "--mem 3x",
        "--time soon: expected minutes",
        "--env Q: expected NAME=VALUE",
        "--env-preset quick: expected nccl-debug, no-infiniband, flight-recorder",
        "--max-restarts needs --launcher torchrun",
        "output is set by ddp_kit",
        "--srun K V",
        "one line a flag",
        "must have no %",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("word", ["recipes/mine", "recipes", "mine x"])
def test_a_recipe_that_is_neither_a_file_nor_a_modules_name_is_not_submitted(word: str) -> None:
    Path("recipes").mkdir()
    Path("recipes/mine.py").write_text("x = 1\n")
    with pytest.raises(
        LaunchError, match=rf"{word}:? (is not there .*|expected a recipe's \.py file)"
    ):
        planned([word, "--lr", "1"])


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


def test_a_flag_of_the_launcher_behind_the_recipe_is_refused_unless_the_recipe_has_it() -> None:
    Path("recipe.py").write_text("class Settings:\n    nodes: int = 2\n")
    assert planned(["recipe.py", "--nodes", "4"])[0].runs[0].words[1:3] == ("--nodes", "4")
    for flag in ("--time", "--nproc_per_node", "--min-nodes"):
        with pytest.raises(
            LaunchError,
            match=f"{flag} comes after the recipe.* Type it before: ddp-kit slurm {flag} ",
        ):
            planned(["recipe.py", "--lr", "1", f"{flag}=3"])
    assert planned(["recipe.py", "--", "--time", "3"])[0].runs[0].words[1:3] == ("--time", "3")
    with pytest.raises(LaunchError, match=r"Type it before: ddp-kit sweep --parallel "):
        sweep._main(["--grid", "lr=1,2", "recipe.py", "--parallel", "2"])


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_behind_the_recipe_submits_no_job(flag: str) -> None:
    with pytest.raises(
        LaunchError, match=r"`ddp-kit run recipe.py --help`.*`ddp-kit slurm --help`"
    ):
        planned(["recipe.py", "--lr", "1", flag])


def test_every_launchers_flag_is_none_of_ddp_kits() -> None:
    import ddp_kit

    own = vars(with_recipe(parser("slurm", what="")).parse_args([]))
    assert {field.name for field in dataclasses.fields(ddp_kit.Settings)} & set(own) == set()


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


@pytest.mark.parametrize(
    "option",
    [
        "parsable",
        "quiet",
        "wait",
        "wrap=date",
        "test-only",
        "help",
        "usage",
        "version",
        "no-requeue",
        "comment=mine",
        "--comm=mine",
    ],
)
def test_options_with_which_sbatch_makes_no_job_of_ours_are_refused(option: str) -> None:
    with pytest.raises(
        LaunchError,
        match=rf"--sbatch {option}: (no job would come of it|(no-requeue|comment) is set by ddp_kit)",
    ):
        plan(f"--sbatch={option}")
    if option != "no-requeue" and "comm" not in option:
        assert "srun" in render(plan("--srun", "wait=60"))


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


def test_why_a_run_waits_is_cut_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted("a")
    why = "DependencyNeverSatisfied and other reasons " * 5
    monkeypatch.setattr(jobs, "_state", lambda *asked: ("waiting", why.strip()))
    assert jobs.main([str(run.folder.parent)]) == 0
    assert capsys.readouterr().out.rstrip().endswith(why.strip())
    assert why not in jobs.table(jobs.rows([run], {}), width=80)


def test_without_a_slurm_it_says_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert slurm_main(["recipe.py"]) == 2
    assert (
        "there is no SLURM client here (sbatch, squeue). On this machine alone: ddp-kit run RECIPE.py"
        in capsys.readouterr().err
    )
    assert not Path("runs").exists()


def test_nodes_that_failed_the_check_are_left_out_by_the_next_submission() -> None:
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/bad_nodes").write_text("n3\nn4\n")
    for typed, excluded in {
        "": "n3,n4",
        "n4,n5": "n4,n5,n3",
        "n[1,3],m[2,3]": "n[1,3],m[2,3],n4",
        "n[1-3,4]": "n[1-3,4]",
        "n[03-04]": "n[03-04],n3,n4",
        "./bad": "./bad",
    }.items():
        assert (
            planned(["--exclude", typed, "recipe.py", "--run-dir", "runs/a"])[0].exclude == excluded
        )
    assert list(cluster.hosts("n[1,08-10]x,m,r[1-2]c[0,2]")) == [
        "n1x",
        "n08x",
        "n09x",
        "n10x",
        "m",
        "r1c0",
        "r1c2",
        "r2c0",
        "r2c2",
    ]


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


def test_the_copy_is_what_git_tracks_as_it_is_now_and_new_modules_beside_the_recipe() -> None:
    Path("project/recipes").mkdir(parents=True)
    files = {
        "lib.py": "old",
        "recipes/mine.py": "recipe",
        ".gitignore": "data\nsecret.py\n",
        "data/big.bin": "big",
        "gone.py": "gone",
    }
    for name, text in files.items():
        path = Path("project") / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    git("-C", "project", "init", "-q")
    git("-C", "project", "add", "lib.py", ".gitignore", "gone.py")
    git("-C", "project", "commit", "-qm", "first")
    Path("project/lib.py").write_text("as submitted")
    Path("project/gone.py").unlink()
    code = snapshot.code_of(Path("project/recipes/mine.py"), copy=Path("copy").absolute())
    code.take()
    Path("project/lib.py").write_text("edited later")
    copied = {
        str(path.relative_to("copy")): path.read_text()
        for path in Path("copy").rglob("*")
        if path.is_file()
    }
    assert copied == {
        "lib.py": "as submitted",
        ".gitignore": files[".gitignore"],
        "recipes/mine.py": "recipe",
    }
    assert code.copied_recipe == Path("copy/recipes/mine.py").absolute()
    assert code.folders(Path("project/recipes").absolute()) == (
        str(Path("copy/recipes").absolute()),
        str(Path("copy").absolute()),
    )
    assert "-old\n" in Path("code.diff").read_text()
    code.take()
    assert Path("copy/lib.py").read_text() == "edited later"
    assert sorted(path.name for path in Path().iterdir() if "copy" in path.name) == ["copy"]
    with pytest.raises(LaunchError, match="the code cannot be copied there"):
        dataclasses.replace(code, copy=Path("/proc/copy")).take()


def test_code_and_names_in_another_encoding_are_copied_as_they_are() -> None:
    names = [os.fsdecode(name) for name in (b"gr\xfc\xdfe.txt", b"tab\tand\nline.txt")]
    git("init", "-q")
    for name in names:
        Path(name).write_bytes(b"\xfc\r\n")
    git("add", "recipe.py", *names)
    git("commit", "-qm", "first")
    Path(names[0]).write_bytes(b"\xe4\r\n")
    snapshot.code_of(Path("recipe.py"), copy=Path("copy").absolute()).take()
    assert sorted(path.name for path in Path("copy").iterdir()) == sorted([*names, "recipe.py"])
    assert Path("copy", names[0]).read_bytes() == b"\xe4\r\n"
    assert b"-\xfc\r\n+\xe4\r\n" in Path("code.diff").read_bytes()


@pytest.mark.parametrize("word", ["recipes/mine.py", "mypkg.mine"])
@pytest.mark.parametrize("how", ["PYTHONPATH", "--env", "editable install"])
def test_a_src_layouts_modules_come_from_the_copy(
    word: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ("recipes/mine.py", "src/mypkg/__init__.py", "src/mypkg/mine.py")
    for name in files:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    git("init", "-q")
    git("add", *files)
    src = Path("src").absolute()
    monkeypatch.setenv("PYTHONPATH", "src" if how == "PYTHONPATH" else "")
    monkeypatch.setattr(
        sys, "path", [*sys.path, *([str(src)] if how == "editable install" else [])]
    )
    made = planned(
        [*(["--env", f"PYTHONPATH={src}"] if how == "--env" else []), word, "--run-dir", "runs/a"]
    )[0]
    copy = Path("runs/a/code").absolute()
    assert (made.snapshot, made.code) == (str(copy), (str(copy), str(copy / "src")))
    assert made.runs[0].words[0] == (str(copy / word) if word.endswith(".py") else word)
    snapshot.code_of(Path(made.source), copy=copy).take()
    Path("src/mypkg/mine.py").unlink()
    environ = {"PYTHONPATH": os.pathsep.join([*made.code, str(src)])}
    code = "import mypkg.mine; print(mypkg.mine.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=environ,
        cwd="runs",
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    assert found.strip() == str(copy / "src" / "mypkg" / "mine.py")
    assert SlurmPlan.from_json(made.to_json()) == made  # though the module may be gone by then


def test_a_module_without_a_copy_is_said_to_run_where_it_lies(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert slurm_main(["--dry-run", "recipe"]) == 0
    said = capsys.readouterr()
    assert "recipe is not copied: it is a module outside of any git repository" in said.err
    assert "/code" not in said.out
    assert slurm_main(["--dry-run", "--no-snapshot", "recipe"]) == 0
    assert capsys.readouterr().err == ""


def test_without_git_the_copy_is_the_recipes_folder() -> None:
    Path("notes.txt").write_text("x")
    code = snapshot.code_of(Path("recipe.py"), copy=Path("copy").absolute())
    code.take()
    assert [path.name for path in Path("copy").iterdir()] == ["recipe.py"]


def test_a_repository_that_git_will_not_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    git("init", "-q")
    monkeypatch.setenv(
        "GIT_TEST_ASSUME_DIFFERENT_OWNER", "1"
    )  # git's own way to be in somebody else's repository
    with pytest.raises(
        LaunchError,
        match=r"(?s)git rev-parse in .*: fatal: detected dubious ownership .*safe\.directory.*--no-snapshot",
    ):
        snapshot.code_of(Path("recipe.py"), copy=Path("copy").absolute())


def test_a_grid_gives_every_combination_and_refuses_what_it_cannot_name() -> None:
    points = sweep.points_of(["lr=0.1,0.2", "seed=0,1"])
    assert [sweep.folder_of(point) for point in points] == [
        "lr=0.1,seed=0",
        "lr=0.1,seed=1",
        "lr=0.2,seed=0",
        "lr=0.2,seed=1",
    ]
    assert sweep.flags_of(points[1]) == ["--lr", "0.1", "--seed", "1"]
    assert sweep.folder_of({"data-root": "/a/b%c"}) == "data-root=_a_b_c"
    for name in ("run-dir", "run_dir"):
        with pytest.raises(
            LaunchError,
            match=rf"--grid {name}=a,b: the points have folders of their own\. --name NAME",
        ):
            sweep.points_of([f"{name}=a,b"])
    with pytest.raises(LaunchError, match="--parallel -1: expected 0 or more"):
        dataclasses.replace(plan(), parallel=-1)
    with pytest.raises(
        LaunchError,
        match=r"--grid lr: expected.*--grid seed is given twice.*--grid x=a/b,a%b: some of these",
    ):
        sweep.points_of(["lr", "seed=1", "seed=2", "x=a/b,a%b"])


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


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--time", "2-0"], "--time 2-0: partition short allows 60 minutes"),
        (["--sbatch", "time=5-0"], "--sbatch time=5-0: partition short allows 60 minutes"),
        (["--time", "2-0", "--sbatch", "time=30"], ""),
        (["--gpus-per-node", "5"], "--gpus-per-node 5: a node of partition short has 4"),
        (
            ["--sbatch", "gpus-per-node=a100:5"],
            "--sbatch gpus-per-node=a100:5: a node of partition short has 4",
        ),
        (
            ["--sbatch", "gres=shard:9,gpu:5"],
            "--sbatch gres=shard:9,gpu:5: a node of partition short has 4",
        ),
        (["--sbatch", "gpus-per-node=4", "--sbatch", "gres=shard:9"], ""),
    ],
)
def test_what_is_passed_on_to_sbatch_is_held_to_the_partitions_limits_too(
    words: list[str], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ask", lambda *asked: "short*|1:00:00|2|gpu:a100:4(S:0-1)\n")
    made = plan(*words)
    if not fault:
        cluster.require_fits(made)
        return
    with pytest.raises(LaunchError, match=re.escape(fault)):
        cluster.require_fits(made)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30),
        ("90:30", 90.5),
        ("1:30:00", 90),
        ("2-0", 2880),
        ("1-12:30", 2190),
        ("1-1:1:30", 1501.5),
        ("infinite", float("inf")),
    ],
)
def test_times_are_read_as_slurm_reads_them(text: str, expected: float) -> None:
    assert cluster.minutes(text) == expected


def test_accelerates_file_is_honoured_and_contradictions_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = Path("config.yaml")
    config.write_text(
        "compute_environment: LOCAL_MACHINE\nnum_machines: 2\nnum_processes: 8\nfsdp_config:\n  num_processes: 3\n"
    )
    assert accelerate.agreed(None, nodes=None, config=config) == (2, 4)
    config.write_text("""num_machines: 2  # two\nnum_processes: '8'\nmain_process_port: "1"\n""")
    assert accelerate.counts(config) == {"num_machines": 2, "num_processes": 8}
    assert accelerate.agreed(4, nodes=2, config=config) == (2, 4)
    assert accelerate.agreed(3, nodes=1, config=Path("none.yaml")) == (1, 3)
    with pytest.raises(
        LaunchError,
        match=r"--nproc-per-node 3 makes 6 processes, and config\.yaml says num_processes: 8",
    ):
        accelerate.agreed(3, nodes=2, config=config)
    with pytest.raises(
        LaunchError, match=r"1 node\(s\) were asked for, and config\.yaml says num_machines: 2"
    ):
        accelerate.agreed(None, nodes=1, config=config)
    with pytest.raises(LaunchError, match="has no effect without --launcher accelerate"):
        planned(["--accelerate-config", "config.yaml", "recipe.py"])
    with pytest.raises(LaunchError, match=r"--accelerate-config none\.yaml: there is no such file"):
        planned(["--launcher", "accelerate", "--accelerate-config", "none.yaml", "recipe.py"])
    monkeypatch.setenv("HF_HOME", str(Path("home").absolute()))
    assert accelerate.default_config() == Path("home/accelerate/default_config.yaml").absolute()


def submitted(name: str, *, time: int = 1, cluster: str = "", **changes: Any) -> FoundRun:
    """A run directory as a submission leaves it."""
    made = plan("--nodes", "2", "--nproc-per-node", "2")
    home = (Path("runs") / name).absolute()
    (home / "launch").mkdir(parents=True)
    run = Run(folder=str(home), words=("recipe.py", "--run-dir", str(home)))
    (home / "launch" / "plan.json").write_text(
        dataclasses.replace(made, runs=(run,), **changes).to_json()
    )
    record = {"job": "17", "time": time, "folder": str(home / "launch"), "cluster": cluster}
    (home / "launch" / "jobs.jsonl").write_text(json.dumps(record) + "\n")
    return FoundRun(home)


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


def test_a_run_is_found_by_folder_name_and_job() -> None:
    run = submitted("a")
    assert find("runs/a") == find("a") == find("17") == run
    assert list(runs_in(Path("runs"))) == [run]
    with pytest.raises(
        LaunchError, match=r"b: no run directory and no job of a run\. Newest in runs/: a"
    ):
        find("b")


def test_a_sweep_in_place_of_a_run_is_answered_with_its_runs() -> None:
    for number in (0, 1):
        run = submitted(f"grid/lr={number}")
        (run.folder / "launch" / "jobs.jsonl").write_text(
            json.dumps({"job": f"18_{number}", "time": 1, "folder": "x"}) + "\n"
        )
    Path("runs/grid/sweep.json").write_text("{}")
    with pytest.raises(
        LaunchError,
        match=r"grid: a sweep; name one of its runs, by its folder or job: 18_0, 18_1\. To end all .*: scancel 18",
    ):
        find("grid")


STRANGERS = {
    "of no run": {"folder": ""},
    "of another run": {"folder": "/home/me/runs/b"},
    "of another cluster": {"cluster": "two"},
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_strangers_job_of_the_same_number_is_none_of_the_runs(
    stranger: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted("a", cluster="one")
    known = [
        cluster.Job(
            **{
                "id": "17",
                "state": "RUNNING",
                "reason": "None",
                "folder": str(run.folder),
                "cluster": "one",
            }
        )
    ]
    monkeypatch.setattr("ddp_kit.launch.runs.found.has_slurm", lambda: True)
    monkeypatch.setattr("ddp_kit.launch.runs.jobs.has_slurm", lambda: True)
    monkeypatch.setattr(cluster, "jobs", lambda *, ids=(): known)
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(cluster, "ask", lambda *words: told.append(words) or "")
    assert run.jobs() == known
    with pytest.raises(LaunchError, match=r"job 17 \(running\) has it"):
        run.require_free()
    known[0] = dataclasses.replace(known[0], **STRANGERS[stranger])
    assert run.jobs() == []
    run.require_free()
    assert run.is_over()
    for now in (True, False):
        with pytest.raises(LaunchError, match="nothing of it waits or runs"):
            cancel.cancel(run, now=now)
    known[0] = dataclasses.replace(known[0], state="COMPLETED")
    assert jobs.main([]) == 0
    assert "completed" not in capsys.readouterr().out
    assert not told


def test_a_submission_of_an_earlier_version_and_a_sweeps_point_know_their_jobs() -> None:
    job = cluster.Job(id="17", state="RUNNING", reason="None", folder="/runs/grid", cluster="one")
    assert is_of(job, {"job": "17", "time": 1, "folder": "/runs/grid/launch"})
    element = dataclasses.replace(job, id="17_3")
    assert is_of(element, {"job": "17_3", "folder": "/runs/grid/launch", "cluster": "one"})
    assert is_of(element, {"job": "17_3", "folder": "/runs/grid/launch", "cluster": ""})
    assert not is_of(element, {"job": "17_2", "folder": "/runs/grid/launch", "cluster": "one"})


def test_of_several_runs_with_a_job_of_that_number_slurms_own_is_found_and_else_the_newest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = submitted("old", cluster="one")
    new = submitted("new", cluster="two", time=2)
    assert find("17") == new
    monkeypatch.setattr("ddp_kit.launch.runs.found.has_slurm", lambda: True)
    for run, name in ((old, "one"), (new, "two")):
        known = [
            cluster.Job(
                id="17", state="RUNNING", reason="None", folder=str(run.folder), cluster=name
            )
        ]
        monkeypatch.setattr(cluster, "jobs", lambda *, ids=(), known=known: known)
        assert find("17") == run


def test_one_point_of_a_sweep_cannot_change_the_code_of_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    submitted("grid/lr=1", snapshot=str(Path("runs/grid/code").absolute()))
    assert resubmit.main(["runs/grid/lr=1", "--new-code"]) == 2
    assert "code is the whole sweep's" in capsys.readouterr().err


def test_a_lock_tells_a_living_process_from_a_later_one_of_its_number_and_from_one_elsewhere() -> (
    None
):
    run = submitted("a")
    start = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    own = {"host": socket.gethostname(), "pid": os.getpid(), "start": start, "job": ""}
    lock = run.folder / "run.lock"
    lock.write_text(json.dumps(own))
    assert run.holder() == socket.gethostname()
    with pytest.raises(LaunchError, match=r"has it\. Type another --run-dir"):
        run.require_free()
    lock.write_text(json.dumps(own | {"start": "1"}))
    assert run.holder() == ""
    run.require_free()
    lock.write_text(json.dumps(own | {"host": "other"}))
    assert run.holder() == "other"
    with pytest.raises(LaunchError, match="a live run on other has it"):
        run.require_free()
    with pytest.raises(LaunchError, match="it runs on other"):
        cancel.cancel(run, now=True)
    assert "it stops after this step" in cancel.cancel(run, now=False)
    assert (run.folder / "STOP").exists()
    os.utime(lock, (0, 0))
    assert run.holder() == ""


def test_a_run_that_died_without_a_word_is_gone_once_nobody_has_its_lock() -> None:
    run = submitted("a")
    (run.folder / "status.json").write_text('{"status": "running", "step": 3}')
    lock = run.folder / "run.lock"
    lock.write_text(
        json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "start": "of another process",
                "job": "17",
            }
        )
    )
    assert jobs.rows([run], {})[0][2::5] == ("gone", "no process has it any more")
    lock.write_text(json.dumps({"host": "other", "pid": 1, "start": "1", "job": "17"}))
    assert jobs.rows([run], {})[0][2] == "running"
    os.utime(lock, (0, 0))
    assert jobs.rows([run], {})[0][2] == "gone"


@pytest.mark.parametrize(
    "state", ["SPECIAL_EXIT", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD", "A_NEWER_SLURMS"]
)
def test_a_job_in_any_state_but_an_ended_one_keeps_its_run(
    state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = submitted("a")
    known = [cluster.Job(id="17", state=state, reason="None", folder="")]
    monkeypatch.setattr(FoundRun, "jobs", lambda self: known)
    with pytest.raises(LaunchError, match=rf"job 17 \({state.lower()}\) has it"):
        run.require_free()
    assert not run.is_over()
    known[0] = dataclasses.replace(known[0], state="OUT_OF_MEMORY")
    run.require_free()
    assert run.is_over()


def test_a_torn_plan_and_a_dry_run_in_the_wrong_place_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = submitted("a")
    (run.folder / "launch" / "plan.json").write_text('{"nodes": 1')
    with pytest.raises(LaunchError, match=r"the plan is torn .* ddp-kit slurm"):
        resubmit.plan_again(run, {})
    assert slurm_main(["recipe.py", "--dry-run"]) == 2
    assert "--dry-run comes after the recipe" in capsys.readouterr().err


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


def test_logs_are_merged_by_time_over_ranks_and_lives(capsys: pytest.CaptureFixture[str]) -> None:
    run = submitted("a")
    (run.folder / "logs").mkdir()
    (run.folder / "logs" / "rank-0.log").write_text(
        "2026-01-01 00:00:01,000 INFO first\n  of rank 0\n2026-01-01 00:00:03,000 INFO third\n"
    )
    (run.folder / "logs" / "rank-1.log").write_text(
        "2026-01-01 00:00:02,000 INFO second\nunfinished line"
    )
    (run.folder / "launch" / "17_1_log.err").write_text("early\n")
    assert logs.main(["a"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in shown] == ["first", "0", "second", "third", "early"]
    assert logs.main(["17", "--rank", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "[rank 1] 2026-01-01 00:00:02,000 INFO second",
        "[task 1 stderr] early",
    ]


def test_what_a_recipe_prints_is_shown_among_the_lines_of_its_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = submitted("a")
    (run.folder / "logs").mkdir()
    log, out = run.folder / "logs" / "rank-0.log", run.folder / "launch" / "17_0_log.out"
    log.write_text(
        "".join(
            f"2026-01-01 00:0{life}:0{at},000 INFO {text}\n"
            for life in (0, 1)
            for at, text in ((1, "begins"), (9, "ends"))
        )
    )
    submitits = (
        "submitit INFO (2026-01-01 00:0{}:00,500) - Starting with JobEnvironment(job_id=17)\n"
    )
    out.write_text(
        "".join(f"{submitits.format(life)}begins\nprint in life {life}\nends\n" for life in (0, 1))
    )
    assert logs.main(["a"]) == 0
    shown = [re.sub("2026.* INFO ", "", line) for line in capsys.readouterr().out.splitlines()]
    once = ("[rank 0] begins", "[task 0 stdout] print in life {}", "[rank 0] ends")
    assert shown == [text.format(life) for life in (0, 1) for text in once]


def test_a_run_that_waits_says_so_and_is_followed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted("a")
    job = cluster.Job(id="17", state="PENDING", reason="Priority", folder="")
    monkeypatch.setattr(FoundRun, "jobs", lambda self: [job])
    assert logs.main(["a"]) == 0
    assert (
        capsys.readouterr().err
        == f"{run.folder}: nothing has been said yet. Job 17 waits: Priority.\n"
    )
    monkeypatch.setattr(logs, "ASK_S", 0.0)
    monkeypatch.setattr(logs, "POLL_S", 0.01)

    def is_over(self: FoundRun) -> bool:
        (run.folder / "logs").mkdir(exist_ok=True)
        (run.folder / "logs" / "rank-0.log").write_text("at last\n")
        return True

    monkeypatch.setattr(FoundRun, "is_over", is_over)
    assert logs.main(["a", "--rank", "0", "-f"]) == 0
    assert capsys.readouterr().out == "[rank 0] at last\n"
    assert logs.main(["a", "--rank", "3"]) == 2
    assert "--rank 3: the run has ranks 0 to 0" in capsys.readouterr().err


def test_following_the_logs_ends_with_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submitted("a")
    lock, log = run.folder / "run.lock", run.folder / "logs" / "rank-0.log"
    log.parent.mkdir()
    log.write_text("first\n")
    start = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    lock.write_text(
        json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "start": start, "job": ""})
    )
    monkeypatch.setattr(logs, "ASK_S", 0.2)
    monkeypatch.setattr(logs, "POLL_S", 0.05)
    looks: list[bool] = []

    def is_over(self: FoundRun, ask: Any = FoundRun.is_over) -> bool:
        looks.append(ask(self))
        if len(looks) == 3:
            log.write_text("first\nlast\n")
            lock.unlink()
        return looks[-1]

    monkeypatch.setattr(FoundRun, "is_over", is_over)
    assert logs.main(["a", "-f"]) == 0
    assert looks == [False, False, False, True, True]
    assert capsys.readouterr().out.splitlines() == ["[rank 0] first", "[rank 0] last"]
    lock.write_text(json.dumps({"host": "other", "pid": 1, "start": "1", "job": "17"}))
    assert not run.is_over()
    os.utime(lock, (0, 0))
    assert run.is_over()


def test_what_several_ranks_say_alike_is_shown_once() -> None:
    said = [
        (1.0, "rank 0", "start"),
        (1.1, "rank 1", "start"),
        (1.2, "rank 2", "start"),
        (2.0, "rank 1", "own"),
        (9.0, "rank 0", "start"),
    ]
    lines = [
        logs.Line(at, label, f"2026-01-01 00:00:0{int(at)},000 INFO {text}")
        for at, label, text in said
    ]
    assert [line.split("2026")[0] for line in logs.merged(lines)] == [
        "[ranks 0-2] ",
        "[rank 1] ",
        "[rank 0] ",
    ]
    assert (
        len(
            list(
                logs.merged([logs.Line(0.0, "rank 0", "print"), logs.Line(0.0, "rank 1", "print")])
            )
        )
        == 2
    )  # no time: perhaps not alike


def test_no_launcher_module_imports_torch_or_ddp_kit() -> None:
    names = sorted(
        f"launch.{path.stem}"
        for path in (ROOT / "launch").glob("*.py")
        if path.stem not in ("__init__", "executor")
    )
    code = f"import importlib, sys; [importlib.import_module(name) for name in {names}]; print([name for name in ('torch', 'ddp_kit', 'submitit', 'numpy') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
