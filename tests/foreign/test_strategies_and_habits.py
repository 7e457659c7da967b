"""Every strategy with tied weights, adapters over a frozen base, Adafactor and Muon: ddp's numbers, or a refusal by name before the first step."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, distance, recipe, trace, vectors
from lives import Life, live, lives
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, AdamW, Optimizer

from ddp_kit import Data
from ddp_kit.data.seeding import Purpose, key, permutation
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.setup.build import build
from ddp_kit.testing import run_ranks

Adafactor: Any = torch.optim.Adafactor
Muon: Any = getattr(torch.optim, "Muon", None)


class Tied(nn.Module):
    """One table for words in and out, matrices alone between."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.inner = nn.Linear(8, 8, bias=False)
        self.out = nn.Linear(8, 12, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = (x.abs() * 5).long() % 12
        return self.out(self.inner(self.table(words).mean(1)).tanh())[:, :4]


class Adapter(nn.Module):
    """A frozen layer and a trained product of low rank beside it."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x)) * 2.0


def adapted() -> nn.Module:
    return nn.Sequential(
        Adapter(nn.Linear(6, 16)),
        nn.Tanh(),
        Adapter(nn.Linear(16, 16)),
        nn.Tanh(),
        nn.Linear(16, 4, bias=False),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"tied": Tied, "adapters": adapted}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "Adafactor": lambda p: Adafactor(p, lr=0.05),
}
if Muon is not None:
    OPTIMIZERS["Muon"] = lambda p: Muon(p, lr=0.02)
STRATEGIES = ["ddp", "zero1", "fsdp", "deepspeed"]


def made(model: str, optimizer: str, settings: Settings) -> Any:
    return recipe(
        settings,
        model=MODELS[model],
        optimizer=lambda m: OPTIMIZERS[optimizer](p for p in m.parameters() if p.requires_grad),
        eval_data=lambda: Data(vectors(20)),
    )


def bare(model: str, optimizer: str, precision: str, *, steps: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(key(0, Purpose.WEIGHTS))
    net = MODELS[model]().to(torch.float64 if precision == "fp64" else torch.float32)
    own = OPTIMIZERS[optimizer](p for p in net.parameters() if p.requires_grad)
    inputs, labels = vectors().tensors
    for step in range(steps):
        part = torch.from_numpy(permutation(0, 0, 240)[24 * step : 24 * step + 24])
        own.zero_grad()
        logits = net(inputs[part].to(next(net.parameters()).dtype))
        cross_entropy(logits, labels[part]).backward()
        own.step()
    return dict(net.state_dict())


REFUSED = {
    ("Adafactor", "fsdp"): "Adafactor reads numbers off weights or gradients that are split",
    ("Adafactor", "deepspeed"): "Adafactor: DeepSpeed lays parameters into one",
    ("Muon", "deepspeed"): "Muon: it cannot be tried out on a tensor of one dimension",
}


def settings_of(strategy: str, **changes: Any) -> Settings:
    """DeepSpeed knows no fp64."""
    given: dict[str, Any] = {"max_steps": 4, "micro_batch": 6, "strategy": strategy}
    if strategy == "deepspeed":
        given["precision"] = "fp32"
    return Settings(**(given | changes))


def follows_bare_torch(group: Group, model: str, optimizer: str, strategy: str) -> None:
    settings = settings_of(strategy)
    # Muon's products are in it, and would be compared to two digits only.
    torch.bfloat16, before = torch.float64, torch.bfloat16
    try:
        ours = trace(group, made(model, optimizer, settings), settings)
        expected = bare(model, optimizer, settings.precision, steps=4)
    finally:
        torch.bfloat16 = before
    within = 1e-5 if settings.precision == "fp32" else 1e-10
    assert distance(ours.state, expected) <= within


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_tied_weights_and_adapters_train_as_in_bare_torch(
    group: Group, model: str, optimizer: str
) -> None:
    follows_bare_torch(group, model, optimizer, "ddp")


@pytest.mark.slow
@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("strategy", STRATEGIES[1:])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_so_they_do_with_every_strategy(
    group: Group, model: str, optimizer: str, strategy: str
) -> None:
    if (optimizer, strategy) not in REFUSED:
        follows_bare_torch(group, model, optimizer, strategy)


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize(("optimizer", "strategy"), REFUSED)
def test_an_optimizer_that_a_strategy_cannot_split_is_refused_on_one_rank_too(
    group: Group, optimizer: str, strategy: str
) -> None:
    settings = settings_of(strategy)
    with pytest.raises(ConfigError, match=REFUSED[optimizer, strategy]):
        build(made("tied", optimizer, settings), settings, group)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_run_that_is_cut_goes_on_on_one_rank_and_back(
    tmp_path: Path, model: str, optimizer: str, strategy: str
) -> None:
    if (optimizer, strategy) in REFUSED:
        return
    make = partial(made, model, optimizer)
    settings = settings_of(strategy, max_steps=6, save_every=2, eval_every=2, ema=0.5)
    whole = lives(make, settings, world_size=2)[0]
    own = replace(settings, run_dir=str(tmp_path / "run"), max_steps=2)
    run_ranks(live, 2, make, own, group=False)
    for ranks, end in ((1, 4), (2, 6)):
        on = replace(own, max_steps=end, change=("max_steps",))
        resumed: Life = run_ranks(live, ranks, make, on, group=False)[0]
    assert resumed.step == 6
    # Muon computes in bfloat16, and split weights are added up in another order.
    within = 2e-2 if optimizer == "Muon" else 1e-5
    assert distance(resumed.state, whole.state) <= within
    assert distance(resumed.files, whole.files) <= within
    assert resumed.metrics == pytest.approx(whole.metrics, rel=within)
