"""Images of your own, a CSV of their labels, and any classification model of torchvision,
fine-tuned or from scratch.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/own_data.py --images photos \
        --labels labels.csv --size 128
    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/own_data.py --images photos \
        --labels labels.csv --size 128 --init-from resnet18.safetensors --init-partial \
        --freeze 'conv1.*' 'bn1.*' 'layer1.*' --backbone-lr 0.1

CSV: file, label; if you like split (train, validation, test; empty: by fold) and group (of files
that stay together, say a patient's). Folds are hashes of names, so that added files change no
other's; --fold 0 to --fold 4 hold each image out once. 1,000 cats, 350 dogs, 150 trucks of CIFAR-10
(32 pixels, bf16), 10 epochs, 180 steps: 65.2 % of 1,500 test images, 500 of each class; 67.7 % by
the second command (--backbone-lr 0.3) from 4 epochs on 14,000 images of seven other classes. One
run each, 93 s of CPU time in all on 2 ranks on 2 busy CPU cores, torch 2.15.
"""

import csv
from dataclasses import dataclass, field
from fnmatch import filter as matching
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.optim import AdamW

import ddp_kit
from ddp_kit import Data, LossSum, Recipe, orders, schedules
from ddp_kit.data.cache import decoded
from ddp_kit.data.images import ImageArray
from ddp_kit.errors import ConfigError, DataError, nearest, require, some
from ddp_kit.settings import EarlyStop


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Images of your own."""

    global_batch: int = 64
    micro_batch: int = 16  # 4 micro-batches: BatchNorm gives the same numbers on 1, 2 and 4 ranks
    epochs: int = 10
    early_stop: EarlyStop = field(
        default_factory=lambda: EarlyStop(metric="balanced_accuracy", mode="max", patience=10)
    )
    images: str = "data/images"  # folder of the images
    labels: str = (
        "data/labels.csv"  # table with the columns file, label and, if you like, split and group
    )
    size: int = 224  # pixels that images are resized to, each side
    augment: bool = True  # crop and flip the training images at random
    fold: int = 0  # the part that is held out for validation
    folds: int = 5  # parts that files without a split are dealt into
    balance: Literal["loss", "order", "none"] = (
        "loss"  # rare classes weigh more in the loss, or are drawn more often
    )
    architecture: str = "resnet18"  # a classification model of torchvision.models
    freeze: tuple[str, ...] = ()  # patterns of names of parameters that stay as loaded: 'layer1.*'
    lr: float = 1e-3  # peak learning rate of the last layer
    backbone_lr: float = 1.0  # times lr, for the layers before it
    weight_decay: float = 0.05


def read(settings: Settings) -> list[dict[str, str]]:
    """Returns the rows of the CSV in order of file names, each with its split: its own, else that
    of its fold.
    """
    table, folder = Path(settings.labels), Path(settings.images)
    if not table.is_file():
        raise DataError(f"{table.absolute()} was not found. Type: --labels FILE.csv --images DIR")
    with table.open(newline="", encoding="utf-8-sig") as text:  # spreadsheets put a mark in front
        rows = sorted(csv.DictReader(text), key=lambda row: row.get("file") or "")
    if not rows or not {"file", "label"} <= rows[0].keys():
        raise DataError(
            f"{table}: expected rows with the columns file, label[, split, group]; "
            f"it has {list(rows[0]) if rows else 'none'}."
        )
    if all(row.get("split") for row in rows) and (settings.fold, settings.folds) != (
        Settings.fold,
        Settings.folds,
    ):
        raise ConfigError(
            f"--fold and --folds have no effect: every row of {table} states its split. "
            "Leave them out."
        )
    faults = {
        f"not in {folder.absolute()}; type --images DIR": [
            row["file"] for row in rows if not (folder / row["file"]).is_file()
        ],
        "listed twice": [
            row["file"]
            for row, other in zip(rows[1:], rows, strict=False)
            if row["file"] == other["file"]
        ],
        "without a label": [row["file"] for row in rows if not row["label"]],
        "with a split that is none": [
            row["file"]
            for row in rows
            if (row.get("split") or "test") not in ("train", "validation", "test")
        ],
    }
    if any(faults.values()):
        raise DataError(
            "\n  ".join(
                [
                    f"{table} has files",
                    *(f"{what}: {some(found)}" for what, found in faults.items() if found),
                ]
            )
        )
    for row in rows:
        fold = (
            int.from_bytes(
                blake2b(
                    (row.get("group") or row["file"]).encode(), digest_size=8, key=b"fold"
                ).digest()
            )
            % settings.folds
        )
        row["split"] = row.get("split") or ("validation" if fold == settings.fold else "train")
    return rows


def network(settings: Settings, classes: int) -> nn.Module:
    models = require(
        "torchvision.models", extra="recipes"
    )  # here: importing it takes longer than --help should
    known = models.list_models(module=models)
    if (name := settings.architecture) not in known:
        raise ConfigError(
            f"--architecture {name}: torchvision.models has none of that name. "
            f"Near: {nearest(name, known) or known}"
        )
    model = models.get_model(
        name,
        num_classes=classes,
        **({"aux_logits": False} if name in ("googlenet", "inception_v3") else {}),
    )
    parameters = dict(model.named_parameters())
    for pattern in settings.freeze:
        if not (found := matching(parameters, pattern)):
            parts = set()
            for name in parameters:
                parts |= {f"{name.rsplit('.', depth)[0]}.*" for depth in range(1, 6)}
            raise ConfigError(
                f"--freeze {pattern}: no parameter has such a name. "
                f"Near: {nearest(pattern, parts) or sorted(parts)}"
            )
        for name in found:
            parameters[name].requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train(
                layer.weight.requires_grad
            )  # the running statistics of a frozen one stay too
    return model


def optimizer(model: nn.Module, settings: Settings) -> AdamW:
    *_, head = filter(None, (list(layer.parameters(recurse=False)) for layer in model.modules()))
    backbone = list(model.parameters())[
        : -len(head)
    ]  # the layer of the classes comes last in each of torchvision's models
    rated = ((head, settings.lr), (backbone, settings.lr * settings.backbone_lr))
    groups = [
        {"params": [parameter for parameter in part if parameter.requires_grad], "lr": rate}
        for part, rate in rated
    ]
    return AdamW([group for group in groups if group["params"]], weight_decay=settings.weight_decay)


def recipe(settings: Settings) -> Recipe:
    if settings.fold not in range(settings.folds):
        raise ConfigError(
            f"--fold {settings.fold} --folds {settings.folds}: expected a fold from 0 to folds - 1."
        )
    if settings.freeze and not settings.init_from:
        raise ConfigError(
            "--freeze would keep random weights: type --init-from FILE.safetensors too."
        )
    rows, folder = read(settings), Path(settings.images)
    classes = sorted({row["label"] for row in rows})
    labels = np.array([classes.index(row["label"]) for row in rows])
    split = np.array([row["split"] for row in rows])
    counts = np.bincount(labels[split == "train"], minlength=len(classes))
    if not counts.all():
        raise DataError(
            "no training image has the label "
            f"{some([classes[k] for k in np.flatnonzero(counts == 0)])}."
        )
    weights = counts.sum() / (len(counts) * counts)  # (C,), each 1 if all classes are as frequent
    weight_of = torch.tensor(
        weights if settings.balance == "loss" else np.ones(len(classes)), dtype=torch.float32
    )
    drawn = orders.weighted(weights[labels[split == "train"]])

    def part(name: str) -> ImageArray:
        images = decoded(
            [folder / row["file"] for row in rows],
            beside=folder,
            size=(settings.size, settings.size),
        )  # once a node
        # mean and std are of ImageNet's pixels: torchvision's weights expect them
        whole = ImageArray(
            images,
            labels,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            crop_padding=settings.augment * settings.size // 8,
            flip=settings.augment,
        )
        return whole.subset(np.flatnonzero(split == name))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossSum:
        images, labels = batch  # (B, 3, size, size) float, (B,) int
        logits = model(images)
        weight = weight_of.to(labels.device)[labels]
        right = logits.argmax(1) == labels
        metrics: dict[str, tuple[Any, Any]] = {"accuracy": (right.sum(), len(labels))}
        if not model.training:
            of_class = one_hot(labels, len(classes))  # (B, C)
            metrics |= {
                f"recall/{name}": ((right * of_class[:, k]).sum(), of_class[:, k].sum())
                for k, name in enumerate(classes)
            }
        # sum and sum of weights: divided once over all ranks, where a mean for each micro-batch
        # would weigh rare classes wrong
        return LossSum(
            (weight * cross_entropy(logits, labels, reduction="none")).sum(),
            weight.sum(),
            metrics=metrics,
        )

    return Recipe(
        model=lambda: network(settings, len(classes)),
        loss=loss,
        optimizer=lambda model: optimizer(model, settings),
        scheduler=lambda optimizer, total_steps: schedules.warmup_cosine(
            optimizer, total_steps, warmup=0.1
        ),
        train_data=lambda: Data(
            part("train"), order=drawn if settings.balance == "order" else None
        ),
        eval_data=lambda: part("validation"),
        test_data=(lambda: part("test")) if "test" in split else None,
        summarize=lambda means, rows: {
            "balanced_accuracy": np.nanmean([means[f"recall/{name}"] for name in classes])
        },
    )
