"""`--init-from` with another head: refused whole, or by asking taken in part with a table of what was not."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import Settings
from lives import alone
from safetensors.torch import load_file, save_file
from torch import nn

from ddp_kit.checkpoint.init_from import load_weights
from ddp_kit.config.validation import check
from ddp_kit.errors import ConfigError


def net(classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, classes))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(net(7).state_dict(), tmp_path / "seven.safetensors")
    return tmp_path / "seven.safetensors"


def test_a_head_of_another_shape_is_refused_whole_with_what_to_type(file: Path) -> None:
    model = net(3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ConfigError, match=r"2.weight: here \(3, 8\), there \(7, 8\)(.|\n)*--init-partial"
    ):
        load_weights(model, file, group=alone())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_partial_load_takes_what_fits_and_shows_the_rest(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, given = net(3), load_file(file)
    head = model[2].weight.detach().clone()
    with caplog.at_level(logging.INFO, "ddp_kit"):
        load_weights(model, file, group=alone(), partial=True)
    assert all(
        torch.equal(tensor, given[name])
        for name, tensor in model.state_dict().items()
        if not name.startswith("2.")
    )
    assert torch.equal(model[2].weight, head)
    assert (
        "took 7 of the model's 9 tensors; not these:\n  shape       2.bias: here (3,), there (7,)\n  shape       2.weight"
        in caplog.text
    )


def test_a_partial_load_of_what_fits_whole_says_nothing(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ddp_kit"):
        load_weights(net(7), file, group=alone(), partial=True)
    assert not caplog.text


def test_a_partial_load_in_which_nothing_fits_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="does not fit; nothing was loaded") as refused:
        load_weights(nn.Linear(5, 5), file, group=alone(), partial=True)
    assert "--init-partial" not in str(refused.value)


def test_a_frozen_tensor_is_never_left_at_its_initial_values(file: Path) -> None:
    model = net(3)
    model[2].weight.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"Frozen, and so needed from it: 2\.weight\."):
        load_weights(model, file, group=alone(), partial=True)


def test_partial_without_a_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="--init-partial has an effect with --init-from only"):
        check(Settings(init_partial=True))


def test_a_pickle_is_refused_with_a_command_that_converts_it(tmp_path: Path) -> None:
    model = net(3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="looks like a pickle") as refused:
        load_weights(net(3), tmp_path / "weights.pth", group=alone())
    command = str(refused.value).splitlines()[-1].strip()
    assert command.startswith("python -c")
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    made = net(3)
    load_weights(made, tmp_path / "weights.safetensors", group=alone())
    assert torch.equal(made[0].weight, model[0].weight)
