"""own_data: a folder and a CSV of one's own. Folds, weights, freezing, fine-tuning from a local file; the same numbers on any ranks."""

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shipped
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from ddp_kit.cli import ckpt
from ddp_kit.errors import ConfigError, DataError
from ddp_kit.recipe import Recipe, load_recipe

COLOURS = {"green": (60, 200, 70), "red": (220, 40, 40), "white": (230, 230, 230)}
COUNTS = {"green": 25, "red": 100, "white": 35}
SMALL = [
    "--architecture",
    "squeezenet1_1",
    "--size",
    "32",
    "--global-batch",
    "32",
    "--micro-batch",
    "8",
    "--lr",
    "0.002",
    "--log-every",
    "1",
]


def write_table(
    folder: Path, rows: Iterable[tuple[str, ...]], *, columns: tuple[str, ...] = ("file", "label")
) -> None:
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 photographs of a kind, JPEG and PNG of several sizes: a disc of the class's colour on a dim, noisy ground."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "images").mkdir()
    rng, rows = np.random.default_rng(0), []
    for label, count in COUNTS.items():
        for i in range(count):
            height, width = rng.integers(36, 60, size=2)
            pixels = rng.integers(90, size=(height, width, 3))
            y, x = np.ogrid[:height, :width]
            pixels[(y - height / 2) ** 2 + (x - width / 2) ** 2 < rng.integers(60, 200)] = COLOURS[
                label
            ] + rng.integers(-30, 30, size=3)
            name = f"{label}-{i:03}.{'png' if i % 2 else 'jpg'}"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / name)
            rows.append((name, label))
    write_table(folder, rows)
    return folder


def flags(folder: Path, *more: str) -> list[str]:
    return ["--images", str(folder / "images"), "--labels", str(folder / "labels.csv"), *more]


@cache
def own_data() -> Any:
    """The recipe's module."""
    return sys.modules[load_recipe(str(shipped.RECIPES / "own_data.py")).build.__module__]


def settings(folder: Path, **fields: Any) -> Any:
    own = {
        "images": str(folder / "images"),
        "labels": str(folder / "labels.csv"),
        "architecture": "squeezenet1_1",
        "size": 32,
    }
    return own_data().Settings(**{**own, **fields})


def test_it_learns_the_rare_classes_too_with_the_same_numbers_on_two_ranks(
    photos: Path, tmp_path: Path
) -> None:
    shipped.assert_same_numbers(
        "own_data",
        *flags(photos, *SMALL, "--max-steps", "24", "--precision", "fp64"),
        tmp_path=tmp_path,
    )
    reached = json.loads((tmp_path / "ranks-2/run/status.json").read_text())["metrics"]
    assert reached["balanced_accuracy"] >= 0.85  # one class for all gives 0.33


def test_each_file_is_held_out_once_over_the_folds_and_stays_when_others_are_added(
    photos: Path, tmp_path: Path
) -> None:
    held_out = [
        [
            row["file"]
            for row in own_data().read(settings(photos, fold=k, folds=4))
            if row["split"] == "validation"
        ]
        for k in range(4)
    ]
    assert Counter(name for fold in held_out for name in fold) == Counter(
        path.name for path in (photos / "images").iterdir()
    )
    assert min(map(len, held_out)) > 20
    (tmp_path / "images").symlink_to(photos / "images")
    write_table(tmp_path, [(name, name.split("-")[0]) for fold in held_out[:3] for name in fold])
    before = {
        row["file"]: row["split"] for row in own_data().read(settings(photos, fold=1, folds=4))
    }
    assert all(
        before[row["file"]] == row["split"]
        for row in own_data().read(settings(tmp_path, fold=1, folds=4))
    )


def test_a_stated_split_is_kept_and_a_group_stays_together(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(photos / "images")
    names = sorted(path.name for path in (photos / "images").iterdir())
    rows = [
        (name, name.split("-")[0], "test" if i % 3 == 0 else "", f"patient {i // 8}")
        for i, name in enumerate(names)
    ]
    write_table(tmp_path, rows, columns=("file", "label", "split", "group"))
    found = own_data().read(settings(tmp_path))
    assert [row["split"] for row in found][::3] == ["test"] * len(found[::3])
    of_group: dict[str, set[str]] = {}
    for row in found:
        of_group.setdefault(row["group"], set()).add(row["split"])
    assert {len(splits - {"test"}) for splits in of_group.values()} == {1}
    assert set().union(*of_group.values()) == {"train", "validation", "test"}


@pytest.mark.parametrize("balance", ["loss", "none"])
def test_the_loss_is_torchs_weighted_mean_however_the_batch_is_cut(
    photos: Path, balance: str
) -> None:
    recipe: Recipe = own_data().recipe(settings(photos, balance=balance))
    train = Counter(
        row["label"] for row in own_data().read(settings(photos)) if row["split"] == "train"
    )
    weights = torch.tensor([sum(train.values()) / (3 * train[name]) for name in COLOURS])
    labels, logits = torch.arange(40) % 3 * (torch.arange(40) % 2), torch.randn(40, 3)
    assert recipe.loss is not None
    parts = [
        recipe.loss(torch.nn.Identity(), (logits[own], labels[own]))
        for own in (slice(0, 7), slice(7, 40))
    ]
    mean = sum(part.total for part in parts) / sum(part.count for part in parts)
    assert torch.allclose(
        mean, cross_entropy(logits, labels, weight=weights if balance == "loss" else None)
    )


def test_drawing_by_class_makes_the_classes_even(photos: Path) -> None:
    recipe: Recipe = own_data().recipe(settings(photos, balance="order"))
    data = recipe.train_data()
    labels = data.dataset.labels[data.dataset._rows]
    drawn = np.concatenate([labels[data.order(0, epoch, len(data.dataset))] for epoch in range(20)])
    assert np.bincount(drawn) / len(drawn) == pytest.approx([1 / 3] * 3, abs=0.05)


def test_what_is_frozen_is_not_trained_and_the_head_has_its_own_rate(photos: Path) -> None:
    chosen = settings(
        photos,
        architecture="resnet18",
        init_from="w",
        freeze=("bn1.*", "layer1.*"),
        lr=0.5,
        backbone_lr=0.1,
    )
    model = own_data().network(chosen, 3)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {
        name for name, _ in model.named_parameters() if name.startswith(("bn1.", "layer1."))
    }
    assert not model.bn1.training
    assert not model.layer1[0].bn2.training
    assert model.layer2[0].bn1.training
    head, backbone = own_data().recipe(chosen).optimizer(model).param_groups
    assert [id(parameter) for parameter in head["params"]] == [
        id(model.fc.weight),
        id(model.fc.bias),
    ]
    assert (head["lr"], backbone["lr"]) == (0.5, 0.05)
    assert len(head["params"]) + len(backbone["params"]) + len(frozen) == len(
        list(model.parameters())
    )


def test_faults_of_the_table_are_named_all_at_once(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(photos / "images")
    write_table(
        tmp_path,
        [
            ("none.png", "red", ""),
            ("red-001.png", "", "train"),
            ("red-002.jpg", "red", "dev"),
            ("red-002.jpg", "red", ""),
        ],
        columns=("file", "label", "split"),
    )
    with pytest.raises(DataError) as refused:
        own_data().read(settings(tmp_path))
    for words in (
        "type --images DIR: none.png",
        "listed twice: red-002.jpg",
        "without a label: red-001.png",
        "with a split that is none: red-002.jpg",
    ):
        assert words in str(refused.value)
    write_table(tmp_path, [("red-001.png", "red")], columns=("name", "label"))
    with pytest.raises(DataError, match=re.escape("it has ['name', 'label']")):
        own_data().read(settings(tmp_path))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"labels": "none.csv"}, "none.csv was not found. Type: --labels"),
        ({"fold": 5}, "--fold 5 --folds 5: expected a fold from 0"),
        ({"freeze": ("features.*",)}, "type --init-from"),
        (
            {"freeze": ("feature.3.*",), "init_from": "w"},
            "--freeze feature.3.*: no parameter has such a name. Near: features.3.*",
        ),
        (
            {"architecture": "resnet19"},
            "--architecture resnet19: torchvision.models has none of that name. Near: resnet1",
        ),
    ],
)
def test_flags_that_cannot_be_are_refused_with_what_to_type(
    fields: dict[str, Any], words: str, photos: Path
) -> None:
    with pytest.raises((ConfigError, DataError), match=re.escape(words)):
        own_data().recipe(settings(photos, **fields)).model()


def test_folds_beside_a_whole_split_are_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(photos / "images")
    write_table(
        tmp_path,
        [("red-001.png", "red", "train"), ("red-002.jpg", "red", "validation")],
        columns=("file", "label", "split"),
    )
    with pytest.raises(ConfigError, match="have no effect"):
        own_data().read(settings(tmp_path, fold=1))


@pytest.mark.slow
def test_fine_tuning_from_a_file_with_another_head_gains_and_leaves_what_is_frozen(
    photos: Path, tmp_path: Path
) -> None:
    pretrained = shipped.finished(
        "own_data", *flags(photos, *SMALL, "--max-steps", "24"), folder=tmp_path / "first"
    )
    weights = tmp_path / "weights.safetensors"
    assert ckpt.main(["export", str(pretrained.run_dir), "--out", str(weights)]) == 0
    given = load_file(weights)
    save_file(
        given
        | {"classifier.1.weight": torch.randn(7, 512, 1, 1), "classifier.1.bias": torch.randn(7)},
        weights,
    )
    tune = [
        "--init-from",
        str(weights),
        "--init-partial",
        "--freeze",
        "features.0.*",
        "features.3.*",
        "--backbone-lr",
        "0.1",
        "--max-steps",
        "4",
    ]
    tuned = shipped.finished(
        "own_data", *flags(photos, *SMALL, *tune), folder=tmp_path / "tuned", world_size=2
    )
    fresh = shipped.finished(
        "own_data",
        *flags(photos, *SMALL, "--max-steps", "4"),
        folder=tmp_path / "fresh",
        world_size=2,
    )
    assert (
        tuned.status["metrics"]["balanced_accuracy"]
        > fresh.status["metrics"]["balanced_accuracy"] + 0.2
    )
    log = (tuned.run_dir / "logs/rank-0.log").read_text()
    assert "shape       classifier.1.weight: here (3, 512, 1, 1), there (7, 512, 1, 1)" in log
    assert (
        ckpt.main(["export", str(tuned.run_dir), "--out", str(tmp_path / "tuned.safetensors")]) == 0
    )
    after = load_file(tmp_path / "tuned.safetensors")
    kept = {name for name in given if torch.equal(given[name], after[name])}
    assert kept == {name for name in given if name.startswith(("features.0.", "features.3."))}


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(photos: Path, tmp_path: Path) -> None:
    args = flags(photos, *SMALL, "--max-steps", "8", "--save-every", "3")
    shipped.assert_goes_on_bit_for_bit("own_data", *args, tmp_path=tmp_path, deaths="5:1")


@pytest.mark.slow
def test_exact_gives_the_same_bits_on_one_two_and_four_ranks(photos: Path, tmp_path: Path) -> None:
    shipped.assert_exact("own_data", *flags(photos, *SMALL, "--max-steps", "4"), tmp_path=tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The default weight initialization"
)  # of GoogLeNet and Inception, which torchvision will change
def test_the_head_is_found_in_every_model_of_torchvision(photos: Path) -> None:
    from torchvision import models

    regnets = [
        "regnet_x_400mf",
        "regnet_y_400mf",
    ]  # they compute their widths with tensors: real ones, and the small ones of a family
    for name in [
        *(name for name in models.list_models(module=models) if not name.startswith("regnet")),
        *regnets,
    ]:
        chosen = settings(photos, architecture=name, lr=0.5, backbone_lr=0.1)
        with torch.device("cpu" if name in regnets else "meta"):
            model = own_data().network(chosen, 17)
        head, backbone = own_data().recipe(chosen).optimizer(model).param_groups
        assert {parameter.shape[0] for parameter in head["params"]} == {17}, name
        assert all(parameter.shape[:1] != (17,) for parameter in backbone["params"]), name
