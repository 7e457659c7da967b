"""What people's recipes do: it either works or is refused at start, in words."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, classify, plain, recipe, vectors
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import IterableDataset, TensorDataset

import ddp_kit
from ddp_kit import Data, LossSum, Objective, Recipe
from ddp_kit.cli import ckpt
from ddp_kit.config.command_line import parse
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, DataError, DdpKitError
from ddp_kit.settings import to_json


class Tutorial(nn.Module):
    """The convolutional net of many tutorials."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 6 * 6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).view(len(x), -1))


def images() -> TensorDataset:
    return TensorDataset(torch.randn(48, 1, 8, 8), torch.randint(4, (48,)))


def test_a_model_that_reshapes_with_view_trains_and_evaluates(tmp_path: Path) -> None:
    settings = Settings(precision="fp32", run_dir=str(tmp_path / "run"), max_steps=2)
    ended = ddp_kit.run(
        recipe(settings, model=Tutorial, train_data=images, eval_data=images), settings
    )
    assert ended.status == "finished"
    assert "channels_last is off" in (tmp_path / "run/logs/rank-0.log").read_text()


class Colour(Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True, kw_only=True)
class Rich(ddp_kit.Settings):
    global_batch: int = 4
    max_steps: int = 1
    data: Path = Path("data")
    colour: Colour = Colour.RED
    hidden: list[int] = field(default_factory=lambda: [1, 2])
    pairs: tuple[tuple[int, float], ...] = ((1, 2.0),)
    largest: float = float("inf")
    hf_token: str = ""


def test_a_runs_settings_come_back_as_they_were(tmp_path: Path) -> None:
    given = Rich(data=Path("/a/b"), colour=Colour.BLUE, hidden=[3], pairs=((1, 0.5), (2, 1.0)))
    values = to_json(given) | {"largest": "inf"}
    (tmp_path / "settings.json").write_text(json.dumps({"settings": values}))
    assert parse(Rich, ["--settings", str(tmp_path / "settings.json")], prog="x") == given
    (tmp_path / "settings.json").write_text(json.dumps({"hf_token": "[redacted]"}))
    with pytest.raises(ConfigError, match=r"was redacted .* type --hf-token"):
        parse(Rich, ["--settings", str(tmp_path / "settings.json")], prog="x")


def test_a_setting_outside_its_choices_is_refused_from_python_too() -> None:
    with pytest.raises(ConfigError, match="--precision nope: expected one of"):
        ddp_kit.run(recipe(Settings()), Settings(precision="nope"))  # type: ignore[arg-type]  # the fault


def test_the_file_of_weights_holds_what_was_evaluated(tmp_path: Path) -> None:
    settings = Settings(precision="fp32", ema=0.9, max_steps=20, run_dir=str(tmp_path / "run"))
    ended = ddp_kit.run(recipe(settings, eval_data=lambda: vectors(50)), settings)
    model = plain()
    assert (
        ckpt.main(
            ["export", str(tmp_path / "run"), "--ema", "--out", str(tmp_path / "model.safetensors")]
        )
        == 0
    )
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    inputs, labels = vectors(50).tensors
    assert cross_entropy(model(inputs), labels).item() == pytest.approx(
        ended.metrics["loss"], rel=1e-5
    )


def halved(model: nn.Module, batch: Any) -> LossSum:
    result = classify(model, batch)
    return LossSum(result.total.bfloat16(), result.count)


class Empty(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


def frozen() -> nn.Module:
    return plain().requires_grad_(False)


def other(optimizer: torch.optim.Optimizer, steps: int) -> StepLR:
    return StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), 1)


REFUSED: dict[str, tuple[dict[str, Any], type[DdpKitError], str]] = {
    "nothing to train": ({"model": frozen}, ConfigError, "nothing to train"),
    "lazy": ({"model": lambda: nn.LazyLinear(4)}, ConfigError, "has no shape yet"),
    "half precision": ({"loss": halved}, DdpKitError, "a sum loses digits in it"),
    "plateau": (
        {"scheduler": lambda optimizer, steps: ReduceLROnPlateau(optimizer)},
        ConfigError,
        "counts evaluations",
    ),
    "another optimizer's scheduler": (
        {"scheduler": other},
        ConfigError,
        "belongs to another optimizer",
    ),
    "count": (
        {"train_data": lambda: Data(vectors(), count=lambda batch: 10 * len(batch[0]))},
        ConfigError,
        "must agree",
    ),
    "empty stream": ({"eval_data": Empty}, DataError, "counted nothing"),
    "order of a stream": (
        {"train_data": lambda: Data(Empty(), order=lambda *_: [])},
        ConfigError,
        "no effect on an iterable",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_at_start(case: str, tmp_path: Path) -> None:
    parts, error, words = REFUSED[case]
    settings = Settings(run_dir=str(tmp_path / "run"))
    with pytest.raises(error, match=words):
        ddp_kit.run(recipe(settings, **parts), settings)
    mended = ddp_kit.run(
        recipe(settings), settings
    )  # in the same directory: the first one never began
    assert mended.status == "finished"


def test_sparse_gradients_are_refused(tmp_path: Path) -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(6, 4, sparse=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(x.abs().argmax(1))

    settings = Settings(run_dir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="sparse"):
        ddp_kit.run(recipe(settings, model=Bag), settings)


def test_two_objectives_for_one_part_are_refused() -> None:
    def build() -> Callable[[Any], torch.optim.Optimizer]:
        return lambda model: torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(ConfigError, match="train the same part"):
        Recipe(
            model=plain,
            train_data=vectors,
            objectives=[Objective(loss=classify, optimizer=build(), trains="a")] * 2,
        )


@pytest.mark.ranks(2)
def test_metrics_that_come_and_go_end_all_ranks_instead_of_hanging(
    group: Group, tmp_path: Path
) -> None:
    def loss(model: nn.Module, batch: Any) -> LossSum:
        result = classify(model, batch)
        extra = {"threes": (torch.tensor(1.0), 1)} if int(batch[1][0]) == 3 else {}
        return LossSum(result.total, result.count, metrics=dict(result.metrics) | extra)

    from ddp_kit.setup.build import build
    from ddp_kit.training.reporter import Reporter
    from ddp_kit.training.step import train_step

    settings = Settings(max_steps=20)
    made = build(recipe(settings, loss=loss), settings, group)
    report = Reporter([], log_every=1)
    words = "Every micro-batch must report every metric|Connection closed by peer|Connection reset"  # where it shows, and on the others
    with pytest.raises((DdpKitError, RuntimeError), match=words):
        for batch in made.feed.batches(start=0, end=20):
            report.step(
                made.training, train_step(made.training, batch), epoch=0, wait_s=0, is_last=False
            )
