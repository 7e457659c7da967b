"""`--exact`: one run, whatever the number of ranks, bit for bit."""

from typing import Any

import pytest
import torch
from cases import Settings, recipe
from lives import lives
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from ddp_kit import Data, LossSum, Recipe, schedules


def images(count: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(count, 3, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator))


def jittered(batch: Any, draws: Any) -> Any:
    return batch[0] + torch.from_numpy(draws.normal(3, 8, 8)).to(batch[0].dtype), batch[1]


def conv() -> nn.Module:
    """BatchNorm, dropout, and more than DDP's first bucket of 1 MiB."""
    head = [
        nn.Flatten(),
        nn.Linear(8 * 36, 1024),
        nn.BatchNorm1d(1024),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(1024, 512),
        nn.Linear(512, 10),
    ]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *head)


def loss(model: nn.Module, batch: Any) -> LossSum:
    logits = model(batch[0])
    right = (logits.argmax(1) == batch[1]).sum()
    return LossSum(cross_entropy(logits, batch[1], reduction="sum"), len(batch[1]), metrics={"accuracy": (right, len(batch[1]))})


def with_everything(settings: Settings) -> Recipe:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        if settings.momentum:
            return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return torch.optim.AdamW(model.parameters(), lr=1e-3)

    return recipe(
        settings,
        model=conv,
        loss=loss,
        optimizer=optimizer,
        scheduler=lambda optimizer, total_steps: schedules.warmup_cosine(optimizer, total_steps),
        train_data=lambda: Data(images(), augment=jittered),
        eval_data=lambda: images(40),
    )


def exact(**fields: Any) -> Settings:
    given = {"global_batch": 32, "micro_batch": 4, "max_steps": 6, "precision": "fp32", "exact": True, "log_every": 1, "eval_every": 2}
    return Settings(**(given | fields))


def bits(life: Any) -> dict[str, Any]:
    """Returns what must be equal: weights, buffers, and the numbers of all records."""
    names = ("loss", "accuracy", "grad_norm", "lr")
    records = [{name: record[name] for name in names if name in record} | {"kind": record["kind"]} for record in life.records]
    return {
        "state": {name: tensor.numpy().tobytes() for name, tensor in life.state.items()},
        "files": {n: t.numpy().tobytes() for n, t in life.files.items()},
        "records": records,
    }


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_weights_and_losses_are_the_same_bits_at_1_2_and_4_ranks(momentum: float) -> None:
    settings = exact(momentum=momentum, grad_clip=2.0, ema=0.5)
    alone, two, four = (lives(with_everything, settings, world_size=ranks)[0] for ranks in (1, 2, 4))
    print([r.get("grad_norm") for r in alone.records])
    assert bits(alone) == bits(two)
    assert bits(alone) == bits(four)
