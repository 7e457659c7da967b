"""The generator comes near the distribution of the images, and both networks with both optimizers go on bit for bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shipped
import torch
from small_cifar import HELD_OUT
from small_mnist import write_small_mnist

from ddp_kit.errors import ConfigError

pytestmark = pytest.mark.usefixtures("few_are_held_out")
SMALL = (
    "--width",
    "8",
    "--lr",
    "0.006",
    "--ema",
    "0.9",
    "--global-batch",
    "32",
    "--micro-batch",
    "16",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_small_mnist(tmp_path_factory.mktemp("data"), train=HELD_OUT + 70 * 32))


def distances(recipe: Any, model: torch.nn.Module, *, root: str) -> tuple[float, float]:
    """Returns the distance of a model's images, and that of images that are all the mean of the real ones."""
    batch = recipe.eval_data().__getitems__(np.arange(HELD_OUT))
    with torch.no_grad():
        rows = recipe.evaluate(model, batch)
    mean = rows["real"].mean(0).expand_as(rows["real"])
    return recipe.summarize({}, rows)["frechet"], recipe.summarize(
        {}, {"real": rows["real"], "fake": mean}
    )["frechet"]


def test_the_images_come_near_the_real_ones_the_same_on_two_ranks(
    root: str, tmp_path: Path
) -> None:
    args = ("--data-root", root, *SMALL, "--epochs", "1", "--precision", "fp64")
    shipped.assert_same_numbers("gan", *args, tmp_path=tmp_path, metric="generator/loss")
    recipe = shipped.made("gan", width=8, data_root=root)
    untrained, all_alike = distances(recipe, recipe.model(), root=root)
    ends = [
        shipped.Ended(codes=[], outputs=[], errors="", run_dir=tmp_path / name / "run").status[
            "metrics"
        ]["frechet"]
        for name in ("ranks-1", "ranks-2")
    ]
    assert ends[0] == pytest.approx(ends[1], abs=1e-9)
    assert ends[0] < min(untrained, all_alike) / 2


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(root: str, tmp_path: Path) -> None:
    args = ("--data-root", root, *SMALL, "--max-steps", "12", "--save-every", "5")
    shipped.assert_goes_on_bit_for_bit(
        "gan", *args, tmp_path=tmp_path, deaths="8:1", metric="generator/loss"
    )


@pytest.mark.slow
def test_exact_gives_the_same_bits(root: str, tmp_path: Path) -> None:
    shipped.assert_exact(
        "gan",
        "--data-root",
        root,
        *SMALL,
        "--micro-batch",
        "8",
        "--max-steps",
        "12",
        tmp_path=tmp_path,
        metric="generator/loss",
    )


def test_the_distance_is_that_of_normal_distributions() -> None:
    """For covariances that commute: the squared distance of the means and of the deviations."""
    generator = torch.Generator().manual_seed(0)
    whitened = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    whitened = torch.linalg.qr(whitened - whitened.mean(0))[0] * 499**0.5  # covariance: exactly 1
    one, two = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, 2.5, 1.0])
    found = shipped.made("gan").summarize(
        {}, {"real": whitened * one, "fake": whitened * two + 2.0}
    )
    assert found["frechet"] == pytest.approx((one - two).square().sum().item() + 3 * 4)


def test_the_grid_shows_64_images_row_by_row() -> None:
    recipe = shipped.made("gan", width=4)
    model = recipe.model()
    with torch.no_grad():
        torch.manual_seed(1)
        grid = recipe.samples(model)["digits"]
        torch.manual_seed(1)
        images = model.images(64)
    assert grid.shape == (1, 224, 224)
    assert grid.min() >= 0
    assert grid.max() <= 1
    assert torch.equal(grid[0, 28:56, 2 * 28 : 3 * 28], images[8 + 2, 0])


def test_a_width_that_the_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 4"):
        shipped.made("gan", width=6)
