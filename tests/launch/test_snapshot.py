"""The code as it is submitted: which files are copied, and where Python finds them."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_plans import git

from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.slurm import snapshot
from ddp_kit.launch.slurm.plan import SlurmPlan
from ddp_kit.launch.slurm.planning import planned

pytestmark = pytest.mark.usefixtures("in_a_project")


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
