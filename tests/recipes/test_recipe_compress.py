"""recipes/compress.py: the student learns from the teacher, the same on any number of ranks; int8 and the exported file say the same."""

import sys
from pathlib import Path
from typing import Any

import pytest
import shipped
import torch
from safetensors.torch import save_file
from torch import nn

from ddp_kit.errors import ConfigError
from ddp_kit.recipe import load_recipe

FLAGS = [
    "--width",
    "4",
    "--global-batch",
    "64",
    "--micro-batch",
    "16",
    "--epochs",
    "2",
    "--lr",
    "0.2",
    "--hint",
    "1",
]


pytestmark = pytest.mark.usefixtures("few_are_held_out")


@pytest.fixture
def compress(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("cifar", "compress"):  # recipes become modules of this process
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    return sys.modules[load_recipe(str(shipped.RECIPES / "compress.py")).build.__module__]


@pytest.fixture
def teacher(compress: Any, cifar_root: Path, tmp_path: Path) -> str:
    """A ResNet whose convolutions are random and whose last layer is fitted to the training images."""
    torch.manual_seed(0)
    model = compress.cifar.initialised(compress.cifar.resnet(8, 1)).eval()
    images, labels = compress.cifar10(cifar_root, "train").__getitems__(range(600))
    with torch.no_grad():
        features = torch.cat([model[:-1](images), torch.ones(600, 1)], 1)
        solved = torch.linalg.lstsq(
            features, 10 * nn.functional.one_hot(labels, 10).float()
        ).solution
        model[-1].weight.copy_(solved[:-1].T)
        model[-1].bias.copy_(solved[-1])
    file = tmp_path / "resnet.safetensors"
    save_file(model.state_dict(), file)
    assert compress.accuracy(compress.load_resnet(str(file)), str(cifar_root)) > 0.9
    return str(file)


def test_without_labels_two_ranks_learn_from_the_teacher_with_the_numbers_of_one(
    teacher: str, cifar_root: Path, tmp_path: Path
) -> None:
    flags = [*FLAGS, "--teacher", teacher, "--data-root", str(cifar_root), "--precision", "fp64"]
    accuracies = shipped.assert_same_numbers(
        "compress", *flags, tmp_path=tmp_path, metric="accuracy"
    )
    assert max(accuracies[-4:]) > 0.5


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(teacher: str, cifar_root: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, "--teacher", teacher, "--data-root", str(cifar_root), "--save-every", "4"]
    shipped.assert_goes_on_bit_for_bit("compress", *flags, tmp_path=tmp_path, deaths="11:1")


@pytest.mark.slow
def test_it_is_exact_on_one_two_and_four_ranks(
    teacher: str, cifar_root: Path, tmp_path: Path
) -> None:
    shipped.assert_exact(
        "compress", *FLAGS, "--teacher", teacher, "--data-root", str(cifar_root), tmp_path=tmp_path
    )


def test_a_teacher_that_is_not_there_or_no_resnet_is_refused_with_what_to_type(
    compress: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="ddp-kit ckpt export RUN --best --out"):
        compress.recipe(compress.Settings())
    save_file({"0.weight": torch.zeros(4, 3, 5, 5)}, tmp_path / "lenet.safetensors")
    with pytest.raises(ConfigError, match="--model resnet"):
        compress.recipe(compress.Settings(teacher=str(tmp_path / "lenet.safetensors")))


def test_an_int8_layer_gives_the_sums_of_its_rounded_weights_and_inputs(compress: Any) -> None:
    torch.manual_seed(0)
    for layer, inputs in (
        (nn.Conv2d(3, 8, 5), torch.randn(6, 3, 12, 12)),
        (nn.Linear(40, 7), torch.randn(6, 40)),
    ):
        layer = layer.double()
        inputs = inputs.double()
        flat = layer.weight.detach().flatten(1)
        weight_scale = (flat.abs().amax(1) / 127).view(-1, *[1] * (layer.weight.dim() - 1))
        input_scale = (inputs.flatten(1).abs().amax(1) / 127).view(-1, *[1] * (inputs.dim() - 1))
        rounded = (
            nn.Linear(40, 7).double()
            if isinstance(layer, nn.Linear)
            else nn.Conv2d(3, 8, 5).double()
        )
        rounded.weight.data = (layer.weight.detach() / weight_scale).round() * weight_scale
        rounded.bias.data = layer.bias.detach()
        small = compress.Int8(layer)
        assert small.codes.dtype == torch.int8
        with torch.no_grad():
            torch.testing.assert_close(
                small(inputs),
                rounded((inputs / input_scale).round() * input_scale),
                atol=1e-9,
                rtol=0,
            )


def test_the_table_is_printed_and_the_exported_files_need_no_recipe(
    compress: Any,
    teacher: str,
    cifar_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    student = compress.cifar.initialised(compress.cifar.lenet(4)).eval()
    save_file(student.state_dict(), tmp_path / "lenet.safetensors")
    compress.main(
        str(tmp_path / "lenet.safetensors"), teacher, str(cifar_root), str(tmp_path / "out")
    )
    rows = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert len(rows) == 4
    images, _ = compress.cifar10(cifar_root, "test").__getitems__(range(7))
    with torch.no_grad():
        expected = student(images)
        plain, small = (
            torch.export.load(tmp_path / f"out{kind}.pt2").module()(images)
            for kind in ("", "-int8")
        )
    torch.testing.assert_close(plain, expected)
    assert 0 < (small - expected).norm() / expected.norm() < 0.05
    weights = [
        sum(
            tensor.nbytes
            for tensor in torch.export.load(tmp_path / f"out{kind}.pt2").state_dict.values()
        )
        for kind in ("", "-int8")
    ]
    assert weights[1] < 0.27 * weights[0]
