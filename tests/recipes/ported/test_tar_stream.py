"""recipes/ported/tar_stream.py has the loss curve of a bare loop over one reader of the tar files, over an epoch's end."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ported import Program, assert_equal
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate

from ddp_kit.distributed.process_group import Group

SMALL = {"global_batch": 16, "samples": 140, "max_steps": 11, "epochs": 0, "buffer": 30}


def batches(program: Program) -> Iterator[Any]:
    """Epochs of eight batches; the tail of an epoch is dropped."""
    stream = program.recipe.train_data()
    for epoch in range(2):
        stream.set_epoch(epoch)
        samples = list(stream)
        assert len(samples) == len(stream) == 140
        for begin in range(0, 128, 16):
            yield program.placed(default_collate(samples[begin : begin + 16]))


def bare(program: Program) -> list[float]:
    model = program.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=program.settings.lr)
    losses = []
    for (images, labels), _ in zip(batches(program), range(11), strict=False):
        value = cross_entropy(model(images), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.ranks(1, 2)
def test_the_loss_curve_is_that_of_the_bare_loop(group: Group, tmp_path: Path) -> None:
    program = Program("tar_stream", data_root=str(tmp_path), **SMALL)
    assert_equal(program.curves(group)["loss"], bare(program))
