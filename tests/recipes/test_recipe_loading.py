"""Finding a recipe: by file path, as a module, and every way in which it can be missing or broken."""

import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddp_kit.errors import ConfigError
from ddp_kit.recipe import load_recipe
from ddp_kit.train import main

GOOD = """
from dataclasses import dataclass
import ddp_kit

@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    global_batch: int = 8
    epochs: int = 1

def recipe(settings):
    raise RuntimeError("not built by loading")
"""


@pytest.fixture(autouse=True)
def _imports_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A loaded recipe stays in sys.modules and its folder on sys.path; not from one test to the next."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(path: Path, text: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return str(path)


def test_a_recipe_is_loaded_by_its_path_and_sees_the_files_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "beside_it.py", "WIDTH = 7")
    source = load_recipe(write(tmp_path / "my_recipe.py", f"from beside_it import WIDTH\n{GOOD}"))
    assert (source.name, source.path, source.settings().global_batch) == (
        "my_recipe",
        tmp_path / "my_recipe.py",
        8,
    )
    assert source.text == (tmp_path / "my_recipe.py").read_text()
    assert (
        pickle.loads(pickle.dumps(source.settings())) == source.settings()
    )  # spawned loader workers find the module


def test_a_spawned_loader_worker_finds_a_recipe_with_a_dash_in_its_name(tmp_path: Path) -> None:
    """It gets sys.path and what it is to read, pickled."""
    settings = load_recipe(write(tmp_path / "my-recipe.py", GOOD)).settings(global_batch=11)
    code = f"import pickle, sys; sys.path[:] = {sys.path}; print(pickle.loads({pickle.dumps(settings)}).global_batch)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("11\n", "")


def test_a_recipe_is_loaded_as_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "package_of_recipes" / "__init__.py", "")
    write(tmp_path / "package_of_recipes" / "one.py", GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_recipe("package_of_recipes.one").path == tmp_path / "package_of_recipes" / "one.py"


def test_a_recipe_named_like_an_imported_module_does_not_replace_it(tmp_path: Path) -> None:
    import json

    load_recipe(write(tmp_path / "json.py", GOOD))
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "missing.py",
            None,
            r"recipe \S*missing.py: no such file. Expected a .py file or a module's dotted name",
        ),
        ("recipe.txt", GOOD, r"recipe \S*recipe.txt: not a Python file"),
        ("syntax.py", "def recipe(:", r"recipe \S*syntax.py is not Python: invalid syntax"),
        ("binary.py", "\0\0", r"recipe \S*binary.py (is not Python|raises when it is imported)"),
        (
            "raises.py",
            "1 / 0",
            r"(?s)recipe \S*raises.py raises when it is imported:\nTraceback.*raises.py.*ZeroDivisionError",
        ),
        (
            "imports.py",
            "import no_such_module",
            r"(?s)raises when it is imported:.*No module named 'no_such_module'",
        ),
        (
            "empty.py",
            "",
            r"empty.py has no function `recipe\(settings\)`. `ddp-kit new my.py --from digits` writes one",
        ),
        (
            "a_class.py",
            GOOD.replace(
                "def recipe(settings):", "class recipe:\n    def __init__(self, settings):"
            ).replace("    raise", "        raise"),
            r"a_class.py has no function `recipe\(settings\)`",
        ),
        (
            "no_settings.py",
            "def recipe(settings): ...",
            r"no_settings.py has no class `Settings\(ddp_kit.Settings\)`",
        ),
        (
            "bare.py",
            GOOD.replace("@dataclass(frozen=True, kw_only=True)", ""),
            r"bare.py: Settings is no dataclass",
        ),
        (
            "default.py",
            GOOD.replace("epochs: int = 1", "width: int"),
            r"default.py: Settings needs a default for width",
        ),
        (
            "two.py",
            GOOD.replace("recipe(settings)", "recipe(settings, model)"),
            r"two.py: `recipe` must take one argument",
        ),
    ],
)
def test_a_broken_recipe_is_told_with_exit_code_2(
    name: str,
    text: str | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / name) if text is None else write(tmp_path / name, text)
    with pytest.raises(ConfigError, match=message) as found:
        load_recipe(path)
    assert main([path]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[0] == str(found.value).splitlines()[0]
    assert {path.name for path in tmp_path.iterdir()} <= {name, "__pycache__"}  # no run directory


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "no_such_package",
            "recipe no_such_package: neither a file nor a module that can be found",
        ),
        ("no_such_package.module", "recipe no_such_package.module: neither a file nor a module"),
        ("..", "recipe ..: it is a folder"),
        ("a..b", r"recipe a\.\.b: neither a file nor a module"),
        (
            "broken_package.one",
            r"(?s)recipe broken_package.one raises when it is imported:.*OSError: no licence",
        ),
        (
            "incomplete_package.one",
            r"(?s)recipe incomplete_package.one raises when it is imported:.*No module named 'no_such_part'",
        ),
        ("json", r"json has no function `recipe\(settings\)`"),
    ],
)
def test_a_module_that_is_no_recipe_is_told(
    spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "broken_package" / "__init__.py", "raise OSError('no licence')")
    write(tmp_path / "incomplete_package" / "__init__.py", "import no_such_part")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_recipe(spec)


def test_a_mistyped_path_gets_the_nearest_file(tmp_path: Path) -> None:
    write(tmp_path / "cifar.py", GOOD)
    with pytest.raises(ConfigError, match=rf"no such file. Did you mean {tmp_path}/cifar.py\?"):
        load_recipe(str(tmp_path / "cifra.py"))


@pytest.mark.parametrize(("args", "code"), [([], 2), (["--epochs", "1"], 2), (["--help"], 0)])
def test_without_a_recipe_the_usage_is_told(
    args: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == code
    captured = capsys.readouterr()
    assert "usage: python -m ddp_kit.train RECIPE.py [--field value ...]" in (
        captured.err if code else captured.out
    )


def test_help_without_a_recipe_is_printed_by_the_first_rank_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == ""
