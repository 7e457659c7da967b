"""`ddp-kit`: its verbs, its errors, and the recipe it copies."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

from ddp_kit.cli import main, new
from ddp_kit.errors import ConfigError, DataError


def refused(argv, capsys):
    """What `ddp-kit` says on stderr when it refuses with exit code 2; nothing else may be printed."""
    assert main.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_help_lists_every_verb_with_one_line(capsys):
    assert main.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    launchers = ["run", "slurm", "jobs", "logs", "cancel", "resubmit", "sweep"]
    assert [line.split()[0] for line in lines[2:-2]] == [
        *launchers,
        "new",
        "check",
        "plan",
        "evaluate",
        "show",
        "ckpt",
        "doctor",
        "env",
    ]
    assert all(len(line) <= 120 for line in lines)
    assert main.main([]) == 2


@pytest.mark.parametrize("verb", sorted(main.VERBS))
def test_every_verb_has_its_module(verb):
    assert importlib.util.find_spec(main.VERBS[verb][0]) is not None


def test_an_unknown_verb_is_answered_with_the_nearest(capsys):
    assert refused(["shwo", "runs/x"], capsys) == (
        "ddp-kit: unknown verb shwo. Did you mean show? The verbs are: run, slurm, jobs, logs, cancel, resubmit, sweep, "
        "new, check, plan, evaluate, show, ckpt, doctor, env.\n"
    )
    assert "Did you mean" not in refused(["zzz"], capsys)


def test_an_error_of_ours_is_a_message_with_its_exit_code_and_a_bug_keeps_its_traceback(
    capsys, monkeypatch
):
    def fails(error):
        def new_main(argv):
            raise error

        monkeypatch.setattr(new, "main", new_main)
        return main.main(["new"])

    assert fails(DataError("no images in data/: type X")) == 1
    assert capsys.readouterr().err == "ddp-kit: no images in data/: type X\n"
    assert fails(ConfigError("bad")) == 2
    with pytest.raises(ZeroDivisionError):
        fails(ZeroDivisionError())


def test_a_wrong_flag_is_refused_with_the_nearest(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["new", str(tmp_path / "my.py"), "--fron", "cifar"])
    assert end.value.code == 2
    assert "--from" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["digits", "cifar.py", "mnist_mlp"])
def test_new_copies_a_shipped_recipe_and_says_what_to_type_next(tmp_path, capsys, name):
    mine = tmp_path / "my.py"
    assert main.main(["new", str(mine), "--from", name]) == 0
    assert mine.read_bytes() == (ROOT / "recipes" / f"{name.removesuffix('.py')}.py").read_bytes()
    said = capsys.readouterr().out
    assert f"ddp-kit check {mine}" in said
    assert f"torchrun --nproc_per_node=2 -m ddp_kit.train {mine}" in said


def test_new_finds_recipes_of_an_installed_wheel_before_those_of_a_checkout(tmp_path, monkeypatch):
    for folder, names in {
        "wheel": ["digits", "_private"],
        "checkout": ["digits", "own_loop"],
    }.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.py").write_text("")
    monkeypatch.setattr(new, "SHIPPED", (tmp_path / "wheel", tmp_path / "checkout"))
    assert new.find_recipe("digits") == tmp_path / "wheel" / "digits.py"
    assert new.find_recipe("own_loop") == tmp_path / "checkout" / "own_loop.py"
    with pytest.raises(ConfigError, match=r"Shipped are: digits, own_loop\.$"):
        new.find_recipe("_private")


def test_a_ported_program_is_found_by_its_name_and_with_its_folder(tmp_path, monkeypatch):
    """What is shipped under both names is the recipe, unless the folder is said."""
    (tmp_path / "ported").mkdir()
    for name in ("gan.py", "ported/gan.py", "ported/dino.py"):
        (tmp_path / name).touch()
    monkeypatch.setattr(new, "SHIPPED", (tmp_path,))
    assert new.find_recipe("dino") == tmp_path / "ported" / "dino.py"
    assert new.find_recipe("ported/dino.py") == tmp_path / "ported" / "dino.py"
    assert new.find_recipe("gan") == tmp_path / "gan.py"
    assert new.find_recipe("ported/gan") == tmp_path / "ported" / "gan.py"
    with pytest.raises(ConfigError, match=r"other people's programs: dino, gan\. Did you mean"):
        new.find_recipe("dinoo")


def test_the_ported_programs_of_the_package_are_found():
    assert new.find_recipe("nano_gpt").parent.name == "ported"


def test_a_script_with_a_loop_of_its_own_is_started_as_such(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_loop.py").write_text("print('a loop')\n")
    monkeypatch.setattr(new, "SHIPPED", (tmp_path,))
    assert main.main(["new", str(tmp_path / "my.py"), "--from", "own_loop"]) == 0
    said = capsys.readouterr().out
    assert f"torchrun --nproc_per_node=2 {tmp_path / 'my.py'}" in said
    assert "check" not in said


def test_new_never_overwrites(tmp_path, capsys):
    mine = tmp_path / "my.py"
    mine.write_text("precious")
    assert "exists already and is not overwritten" in refused(
        ["new", str(mine), "--from", "digits"], capsys
    )
    assert mine.read_text() == "precious"


def test_new_refuses_names_that_cannot_be_meant(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = refused(["new", "my.py", "--from", "cifr"], capsys)
    assert "no such recipe. Shipped are: char_lm, cifar, " in said
    assert said.endswith("Did you mean --from cifar?\n")
    assert "Type: ddp-kit new my.py" in refused(["new", "my"], capsys)
    assert "Type: mkdir -p none" in refused(["new", "none/my.py"], capsys)
    assert list(tmp_path.iterdir()) == []


def test_env_tells_versions_and_topology_and_no_secret(capsys, monkeypatch):
    import torch

    monkeypatch.setenv("HF_TOKEN", "hunter2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main.main(["env", "--json"]) == 0
    text = capsys.readouterr().out
    facts = json.loads(text)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["topology"]["world_size"] == 1
    assert facts["environment"]["OMP_NUM_THREADS"] == "1"
    assert facts["host"]["cores"] >= 1
    assert "hunter2" not in text
    assert main.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "versions"
    assert any(line.split() == ["torch", torch.__version__] for line in lines)


def test_env_reports_half_set_rank_variables_instead_of_failing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert main.main(["env"]) == 0
    assert "half set. Found RANK=0; missing " in capsys.readouterr().out


def test_git_tells_the_revision_and_whether_it_is_what_ran(tmp_path, monkeypatch):
    from ddp_kit.lifecycle.env_facts import git_revision

    def git(*words):
        identity = ("-c", "user.name=x", "-c", "user.email=x@y")
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    assert git_revision(tmp_path) == {}
    recipe = tmp_path / "recipe.py"
    recipe.write_text("1")
    git("init")
    git("add", "recipe.py")
    git("commit", "-m", "x")
    clean = git_revision(tmp_path)
    assert clean["is_dirty"] is False
    assert len(clean["revision"]) == 40
    (tmp_path / "untracked").write_text("")
    assert git_revision(tmp_path) == clean
    recipe.write_text("2")
    assert git_revision(tmp_path) == {**clean, "is_dirty": True}


def test_help_loads_no_drawing_and_no_flags_library():
    code = "import sys; from ddp_kit.cli.main import main; main(['--help']); assert not {'rich', 'tyro', 'wandb', 'tensorboard'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
