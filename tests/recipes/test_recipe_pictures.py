"""The pictures of recipes/README.md: drawn from metrics.jsonl alone, and none missing."""

import json
import re
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from paths import RECIPES


@pytest.fixture(scope="module")
def draw() -> dict[str, Any]:
    return runpy.run_path(str(RECIPES / "pictures/draw.py"))


def test_a_picture_shows_what_the_records_say(draw: dict[str, Any], tmp_path: Path) -> None:
    records = [{"kind": "train", "step": step, "loss": 2 - step / 100} for step in (0, 50, 100)]
    records += [
        {"kind": "train", "step": 60, "loss": "nan"},
        {"kind": "eval", "step": 50, "accuracy": 0.2},
        {"kind": "eval", "step": 100, "accuracy": 0.8},
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    picture = ElementTree.fromstring(draw["drawn"](tmp_path, losses=["loss"], metrics=["accuracy"]))
    lines = [element.get("points") for element in picture if element.tag.endswith("polyline")]
    left, right, top, bottom = (float(draw[side]) for side in ("LEFT", "RIGHT", "TOP", "BOTTOM"))
    middle, half = (left + right) / 2, (top + bottom) / 2
    assert lines == [
        f"{left},{top} {middle},{half} {right},{bottom}",
        f"{middle},{bottom} {right},{top}",
    ]
    assert {"2", "1", "0.8", "0.2", "step 100", "train loss", "eval accuracy →"} <= {
        element.text for element in picture
    }


def test_a_run_without_the_metric_is_refused_in_words(draw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"kind": "train", "step": 1, "loss": 1.0}) + "\n"
    )
    with pytest.raises(SystemExit, match="no record has error"):
        draw["drawn"](tmp_path, losses=["error"], metrics=[])


def test_each_recipe_stands_in_the_table_and_each_picture_in_the_page() -> None:
    page = (RECIPES / "README.md").read_text()
    assert {path.name for path in RECIPES.glob("*.py")} <= set(
        re.findall(r"\| \[\w+\]\((\w+\.py)\) \|", page)
    )
    assert {f"pictures/{path.name}" for path in (RECIPES / "pictures").glob("*.svg")} == set(
        re.findall(r"\((pictures/\w+\.svg)\)", page)
    )
