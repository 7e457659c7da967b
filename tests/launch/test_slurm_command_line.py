"""The command line of a batch job: what it asks for, and what is refused before anything is written."""

import dataclasses
import re
from pathlib import Path

import pytest
from slurm_plans import plan

from ddp_kit.launch.local import accelerate
from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.runs import sweep
from ddp_kit.launch.slurm import cluster
from ddp_kit.launch.slurm.command_line import parser, with_recipe
from ddp_kit.launch.slurm.planning import planned
from ddp_kit.launch.slurm.script import render
from ddp_kit.launch.slurm.submit import main as slurm_main

pytestmark = pytest.mark.usefixtures("in_a_project")


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


def test_a_flag_of_the_launcher_behind_the_recipe_is_refused_unless_the_recipe_has_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("recipe.py").write_text("class Settings:\n    nodes: int = 2\n")
    assert planned(["recipe.py", "--nodes", "4"])[0].runs[0].words[1:3] == ("--nodes", "4")
    for flag in ("--time", "--nproc_per_node", "--min-nodes"):
        with pytest.raises(
            LaunchError,
            match=f"{flag} comes after the recipe.* Type it before: ddp-kit slurm {flag} ",
        ):
            planned(["recipe.py", "--lr", "1", f"{flag}=3"])
    assert planned(["recipe.py", "--", "--time", "3"])[0].runs[0].words[1:3] == ("--time", "3")
    assert sweep.main(["--grid", "lr=1,2", "recipe.py", "--parallel", "2"]) == 2
    assert "Type it before: ddp-kit sweep --parallel " in capsys.readouterr().err


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


def test_a_module_without_a_copy_is_said_to_run_where_it_lies(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert slurm_main(["--dry-run", "recipe"]) == 0
    said = capsys.readouterr()
    assert "recipe is not copied: it is a module outside of any git repository" in said.err
    assert "/code" not in said.out
    assert slurm_main(["--dry-run", "--no-snapshot", "recipe"]) == 0
    assert capsys.readouterr().err == ""
