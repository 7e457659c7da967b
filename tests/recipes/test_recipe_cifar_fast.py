"""recipes/cifar_fast.py learns, the same on any number of ranks; its first layer whitens, and its flips alternate."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shipped
import torch

from ddp_kit import Draws
from ddp_kit.errors import ConfigError
from ddp_kit.recipe import load_recipe

FLAGS = [
    "--widths",
    "8",
    "32",
    "--global-batch",
    "32",
    "--micro-batch",
    "8",
    "--lr",
    "2",
    "--smoothing",
    "0",
]
SHORT = [*FLAGS, "--epochs", "1", "--small", "1"]
LONG = [*FLAGS, "--epochs", "4"]


pytestmark = pytest.mark.usefixtures("few_are_held_out")


@pytest.fixture
def shipped_recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = load_recipe(str(shipped.RECIPES / "cifar_fast.py"))
    monkeypatch.setitem(sys.modules, "cifar_fast", sys.modules[source.build.__module__])
    return sys.modules[source.build.__module__]


def test_two_ranks_have_the_numbers_of_one(cifar_root: Path, tmp_path: Path) -> None:
    flags = [*SHORT, "--max-steps", "6", "--data-root", str(cifar_root), "--precision", "fp64"]
    shipped.assert_same_numbers("cifar_fast", *flags, tmp_path=tmp_path)


def test_it_learns_in_its_own_arithmetic(cifar_root: Path, tmp_path: Path) -> None:
    ended = shipped.finished(
        "cifar_fast", *LONG, "--data-root", str(cifar_root), folder=tmp_path / "bf16", world_size=2
    )
    assert ended.status["metrics"]["accuracy"] > 0.9


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(cifar_root: Path, tmp_path: Path) -> None:
    flags = [*SHORT, "--max-steps", "16", "--data-root", str(cifar_root), "--save-every", "4"]
    shipped.assert_goes_on_bit_for_bit("cifar_fast", *flags, tmp_path=tmp_path, deaths="11:1")


@pytest.mark.slow
def test_it_is_exact_on_one_two_and_four_ranks(cifar_root: Path, tmp_path: Path) -> None:
    shipped.assert_exact(
        "cifar_fast", *SHORT, "--max-steps", "8", "--data-root", str(cifar_root), tmp_path=tmp_path
    )


def test_the_first_layer_whitens_its_patches(shipped_recipe: Any) -> None:
    images = torch.randn(200, 1, 16, 16).cumsum(2).cumsum(3).repeat(1, 3, 1, 1) / 10 + torch.randn(
        200, 3, 16, 16
    )
    outputs = shipped_recipe.whitening(images)(images)
    found = outputs.transpose(0, 1).flatten(1)
    half = len(found) // 2
    assert torch.equal(found[:half], -found[half:])
    covariance = found[:half] @ found[:half].T / found.shape[1]
    torch.testing.assert_close(covariance, torch.eye(half), atol=0.1, rtol=0)


def test_each_image_is_mirrored_in_every_second_epoch_and_half_of_them_at_first(
    shipped_recipe: Any, cifar_root: Path
) -> None:
    settings = shipped_recipe.Settings(data_root=str(cifar_root), small=0.0, device="cpu")
    data = shipped_recipe.Images(settings, "train")
    data.pixels[:] = (
        torch.arange(32, dtype=torch.uint8)[None, None, :, None] * 8
    )  # brighter to the right
    rises = []
    for epoch in range(4):
        images, _ = data.__getitems__(np.arange(200), Draws(3, epoch, np.arange(200)))
        rises.append(images[:, 0, 16, 24] > images[:, 0, 16, 8])
    assert 60 < int(rises[0].sum()) < 140
    assert torch.equal(rises[1], ~rises[0])
    assert torch.equal(rises[2], rises[0])
    assert torch.equal(rises[3], ~rises[0])


def test_images_are_moved_by_two_pixels_at_most_and_not_at_all_in_evaluation(
    shipped_recipe: Any, cifar_root: Path
) -> None:
    settings = shipped_recipe.Settings(data_root=str(cifar_root), small=0.0, device="cpu")
    data = shipped_recipe.Images(settings, "validation")
    plain, _ = data.__getitems__(np.arange(50))
    from ddp_kit.data.known import cifar10

    torch.testing.assert_close(
        plain, cifar10(cifar_root, "validation").__getitems__(range(50))[0], atol=1e-5, rtol=0
    )
    moved, _ = data.__getitems__(np.arange(50), Draws(0, 0, np.arange(50)))
    unmirrored = [
        torch.where((image == other).all(), 1, 0) for image, other in zip(moved, plain, strict=True)
    ]
    assert sum(map(int, unmirrored)) < 10
    assert set(moved.round(decimals=4).unique().tolist()) <= set(
        plain.round(decimals=4).unique().tolist()
    )  # reflected, not black


def test_workers_are_refused(shipped_recipe: Any) -> None:
    with pytest.raises(ConfigError, match="--num-workers 2 has no effect"):
        shipped_recipe.recipe(shipped_recipe.Settings(num_workers=2))
