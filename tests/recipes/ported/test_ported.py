"""All ported programs: each says what it follows, stands in the table, and goes on bit for bit after a kill."""

import ast
import re
from pathlib import Path

import pytest
import shipped
from paths import RECIPES

PROGRAMS = sorted(path.stem for path in (RECIPES / "ported").glob("*.py"))


def test_there_are_twelve_and_each_is_held_against_a_bare_loop() -> None:
    assert len(PROGRAMS) == 12
    tests = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert tests - {"ported"} == set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_its_first_line_names_the_program_that_it_follows(name: str) -> None:
    text = (RECIPES / "ported" / f"{name}.py").read_text(encoding="utf-8")
    assert re.match(r'"""After [\w/.-]+', text)
    assert f"    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/ported/{name}.py\n" in text
    assert len(text.splitlines()) <= 160
    imported = {
        alias.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ddp_kit")
        for alias in node.names
    }
    assert imported & {"LossSum", "LossMean"}


def test_each_stands_in_the_table() -> None:
    page = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[\w+\]\(ported/(\w+)\.py\) \|", page, re.MULTILINE) == PROGRAMS


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_killed_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    metric = "generator/loss" if name == "wgan_gp" else "loss"
    args = ["--max-steps", "14", "--save-every", "6", "--eval-every", "100"]
    if name == "tar_stream":
        args += ["--data-root", str(tmp_path), "--global-batch", "16", "--samples", "140"]
    shipped.assert_goes_on_bit_for_bit(
        f"ported/{name}", *args, tmp_path=tmp_path, deaths="10:1", metric=metric
    )
