"""Several tasks on one trunk are learned, tasks that a batch lacks do no harm, and learned weights are those of the likelihood."""

import math
from pathlib import Path
from typing import Any

import pytest
import shipped
import torch
from small_cifar import HELD_OUT
from small_mnist import write_small_mnist
from torch.distributions import Normal

from ddp_kit.errors import ConfigError

SMALL = (
    "--width",
    "8",
    "--lr",
    "0.01",
    "--global-batch",
    "32",
    "--micro-batch",
    "16",
    "--epochs",
    "1",
)
pytestmark = pytest.mark.usefixtures("few_are_held_out")
ABSENT = ("--absent", "0.9", "--find-unused-parameters", "--weights", "learned")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_small_mnist(tmp_path_factory.mktemp("data"), train=HELD_OUT + 90 * 32))


def test_every_task_is_learned_the_same_on_two_ranks_where_most_labels_are_absent(
    root: str, tmp_path: Path
) -> None:
    shipped.assert_same_numbers(
        "multitask", "--data-root", root, *SMALL, *ABSENT, "--precision", "fp64", tmp_path=tmp_path
    )
    run_dir = tmp_path / "ranks-2" / "run"
    ended = shipped.Ended(codes=[], outputs=[], errors="", run_dir=run_dir)
    assert "nan" in shipped.values(
        ended, "digit/accuracy"
    )  # there was a step in which no image had a digit
    found = ended.status["metrics"]
    assert found["digit/accuracy"] >= 0.95
    assert found["parity/accuracy"] >= 0.95
    assert found["mass/error"] <= 7  # white pixels; the mean of all as the answer: 14


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(root: str, tmp_path: Path) -> None:
    args = ("--data-root", root, *SMALL, *ABSENT, "--max-steps", "12", "--save-every", "5")
    shipped.assert_goes_on_bit_for_bit("multitask", *args, tmp_path=tmp_path, deaths="8:1")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ABSENT])
def test_exact_gives_the_same_bits(flags: tuple[str, ...], root: str, tmp_path: Path) -> None:
    shipped.assert_exact(
        "multitask",
        "--data-root",
        root,
        *SMALL,
        *flags,
        "--micro-batch",
        "8",
        "--max-steps",
        "12",
        tmp_path=tmp_path,
    )


def test_learned_weights_are_those_of_the_likelihood() -> None:
    model = shipped.made("multitask", weights="learned").model()
    variance, errors = 1.7, torch.linspace(-2, 3, 7)
    for log_variance in model.log_variances.values():
        torch.nn.init.constant_(log_variance, math.log(variance))
    density = (
        Normal(0.0, math.sqrt(variance)).log_prob(errors).sum() + 7 * math.log(2 * math.pi) / 2
    )
    assert model.weighted("mass", errors.square().sum(), 7).item() == pytest.approx(-density.item())
    # of the softmax of outputs divided by the variance, as the paper approximates it
    assert model.weighted("digit", torch.tensor(5.0), 7).item() == pytest.approx(
        5 / variance + 7 * math.log(math.sqrt(variance))
    )


def test_a_batch_without_a_label_has_a_loss_of_zero_that_has_a_gradient() -> None:
    recipe = shipped.made("multitask", absent=0.5, find_unused_parameters=True)
    model = recipe.model()
    result = recipe.loss(
        model,
        (torch.rand(3, 1, 28, 28), torch.tensor([1, 2, 3]), torch.zeros(3, 3, dtype=torch.bool)),
    )
    result.total.backward()
    assert result.total.item() == 0
    assert result.metrics == {
        "digit/accuracy": (0.0, 0),
        "parity/accuracy": (0.0, 0),
        "mass/error": (0.0, 0),
    }
    assert model.blocks[0].weight.grad.abs().sum() == 0
    assert all(parameter.grad is None for parameter in model.heads.parameters())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"absent": 0.5}, "type --find-unused-parameters too"),
        ({"weights": "learned", "task_weights": (1.0, 2.0, 1.0)}, "--task-weights has no effect"),
        ({"blocks": 5}, "1 to 4 blocks"),
    ],
)
def test_flags_that_cannot_be_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        shipped.made("multitask", **changes)
