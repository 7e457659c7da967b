"""A recipe's file, or one beside it, that has the name of a package."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddp_kit.errors import ConfigError
from ddp_kit.recipe import load_recipe

NEEDS = "import {name}\n\nmade = {name}.AutoExecutor\n"
HINT = r"`import submitit` finds .*submitit\.py, as with `python SCRIPT`\. Rename the file"


@pytest.fixture(autouse=True)
def _imports_are_put_back() -> Iterator[None]:
    path, modules = list(sys.path), dict(sys.modules)
    sys.modules.pop("submitit", None)
    yield
    sys.path[:] = path
    for name in sys.modules.keys() - modules.keys():
        del sys.modules[name]
    sys.modules.update(modules)


@pytest.mark.parametrize("name", ["submitit", "beside"])
def test_a_file_that_stands_in_front_of_a_package_is_named_where_the_import_fails(
    tmp_path: Path, name: str
) -> None:
    """The recipe itself has the package's name, or a file beside it."""
    (tmp_path / "submitit.py").touch()
    (tmp_path / f"{name}.py").write_text(NEEDS.format(name="submitit"))
    with pytest.raises(ConfigError, match=HINT):
        load_recipe(str(tmp_path / f"{name}.py"))


def test_no_file_is_named_where_none_stands_in_front_of_a_package(tmp_path: Path) -> None:
    (tmp_path / "helpers_of_mine.py").touch()
    (tmp_path / "mine.py").write_text("import helpers_of_mine\n\n1 / 0\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(tmp_path / "mine.py"))
    assert "Rename" not in str(caught.value)
