"""The generator comes near the distribution of the images, and both networks with both optimizers go on bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shipped
import torch
from small_mnist import write_small_mnist

from ddp_kit.recipe import load_recipe

SMALL = ("--width", "8", "--lr", "0.006", "--ema", "0.9", "--global-batch", "32", "--micro-batch", "8")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_small_mnist(tmp_path_factory.mktemp("data"), train=5000 + 70 * 32))


def made(**changes: Any) -> Any:
    source = load_recipe(str(shipped.RECIPES / "gan.py"))
    return source.build(source.settings(**changes))


def distances(recipe: Any, model: torch.nn.Module, *, root: str) -> tuple[float, float]:
    """Returns the distance of a model's images, and that of images that are all the mean of the real ones."""
    batch = recipe.eval_data().__getitems__(np.arange(1000))
    with torch.no_grad():
        rows = recipe.evaluate(model, batch)
    mean = rows["real"].mean(0).expand_as(rows["real"])
    return recipe.summarize({}, rows)["frechet"], recipe.summarize({}, {"real": rows["real"], "fake": mean})["frechet"]


def test_the_images_come_near_the_real_ones_the_same_on_two_ranks(root: str, tmp_path: Path) -> None:
    args = ("--data-root", root, *SMALL, "--epochs", "1", "--precision", "fp64")
    shipped.assert_same_numbers("gan", *args, tmp_path=tmp_path, metric="generator/loss")
    recipe = made(width=8, data_root=root)
    untrained, all_alike = distances(recipe, recipe.model(), root=root)
    ends = [
        shipped.Ended(codes=[], outputs=[], errors="", run_dir=tmp_path / name / "run").status["metrics"]["frechet"]
        for name in ("ranks-1", "ranks-2")
    ]
    assert ends[0] == pytest.approx(ends[1], abs=1e-9)
    assert ends[0] < min(untrained, all_alike) / 2


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(root: str, tmp_path: Path) -> None:
    args = ("--data-root", root, *SMALL, "--max-steps", "12", "--save-every", "5")
    shipped.assert_goes_on_bit_for_bit("gan", *args, tmp_path=tmp_path, deaths="8:1", metric="generator/loss")


@pytest.mark.slow
def test_exact_gives_the_same_bits(root: str, tmp_path: Path) -> None:
    shipped.assert_exact("gan", "--data-root", root, *SMALL, "--max-steps", "12", tmp_path=tmp_path, metric="generator/loss")
