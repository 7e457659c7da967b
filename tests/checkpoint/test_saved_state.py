"""Corners of what a checkpoint holds."""

import io
import json
from pathlib import Path

import pytest
import torch
from cases import Settings, classify, plain, vectors
from torch import nn

import ddp_kit
from ddp_kit.checkpoint.format.layout import DamagedError
from ddp_kit.checkpoint.format.shard import read_header
from ddp_kit.checkpoint.weights import weights_sha256
from ddp_kit.config.validation import check
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.training.state import Training


def two_rates(group: Group, *, rates: tuple[float, float]) -> Training:
    model = plain()
    layers = [module for module in model if isinstance(module, nn.Linear)]
    groups = [
        {"params": layer.parameters(), "lr": torch.tensor(rate)}
        for layer, rate in zip(layers, rates, strict=True)
    ]
    feed = ddp_kit.build_loader(vectors(), group=group, global_batch=8)
    return ddp_kit.wrap(
        model,
        torch.optim.AdamW(groups, foreach=True, capturable=False),
        classify,
        group=group,
        feed=feed,
    )


def test_rates_that_are_tensors_come_back_to_the_group_they_belong_to(tmp_path: Path) -> None:
    with ddp_kit.process_group(device="cpu") as group:
        ddp_kit.save(two_rates(group, rates=(0.25, 0.5)), tmp_path)
    with ddp_kit.process_group(device="cpu") as group:
        training = two_rates(group, rates=(1.0, 2.0))
        ddp_kit.restore(training, tmp_path)
        assert [float(own["lr"]) for own in training.objectives[0].optimizer.param_groups] == [
            0.25,
            0.5,
        ]


def test_one_training_has_one_folder(tmp_path: Path) -> None:
    with ddp_kit.process_group(device="cpu") as group:
        training = two_rates(group, rates=(0.25, 0.5))
        ddp_kit.save(training, tmp_path / "a")
        with pytest.raises(ConfigError, match="one folder for one training"):
            ddp_kit.save(training, tmp_path / "b")


@pytest.mark.parametrize("second", [(4, 8), (12, 16)], ids=["overlap", "gap"])
def test_tensors_of_a_shard_lie_one_behind_the_other(second: tuple[int, int]) -> None:
    entries = {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": list(second)},
    }
    text = json.dumps(entries).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(second[1])
    with pytest.raises(DamagedError, match="overlap or leave gaps"):
        read_header(io.BytesIO(content), size=len(content), name="rank-0.safetensors")


def test_a_setting_that_does_not_exist_cannot_be_changed() -> None:
    with pytest.raises(ConfigError, match=r"--change lrr: there is no such setting\. Near: lr"):
        check(Settings(change=("lrr", "--early-stop.patience", "recipe")))


@pytest.mark.ranks(2)
def test_a_restore_into_a_life_that_has_trained_fills_the_optimizers_own_memory(
    tmp_path: Path, group: Group
) -> None:
    """New memory takes longer to come by than its content."""

    def memory(training: Training) -> dict[int, int]:
        moments = []
        for own in training.objectives[0].optimizer.state.values():
            moments += own.values()
        return {moment.data_ptr(): i for i, moment in enumerate(moments)}

    model, feed = plain(), ddp_kit.build_loader(vectors(), group=group, global_batch=8)
    training = ddp_kit.wrap(
        model, torch.optim.AdamW(model.parameters()), classify, group=group, feed=feed
    )
    batches = feed.batches(start=0, end=2)
    ddp_kit.train_step(training, next(batches))
    ddp_kit.save(training, tmp_path)
    before, at = weights_sha256(training.model), memory(training)
    ddp_kit.train_step(training, next(batches))
    ddp_kit.restore(training, tmp_path)
    assert weights_sha256(training.model) == before
    assert memory(training) == at
