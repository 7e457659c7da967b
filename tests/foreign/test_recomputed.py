"""A user's own torch.utils.checkpoint, `wrap(exact=True)`, and `--compile` with `--exact`."""

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, classify, distance, recipe, trace, vectors
from lives import live
from torch import nn
from torch.utils.checkpoint import checkpoint

import ddp_kit
from ddp_kit import Data
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.testing import run_ranks


class Recomputed(nn.Module):
    """Runs a part again in backward, where its statistics and a buffer of its own move once more."""

    def __init__(self, *, again: bool, reentrant: bool = False) -> None:
        super().__init__()
        self.again = again
        self.reentrant = reentrant
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 4)
        self.register_buffer("seen", torch.zeros(6))
        self.calls = 0

    def block(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
            with torch.no_grad():
                self.seen += x.mean(0)
        return self.norm(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.again:
            x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        else:
            x = self.block(x)
        return self.head(x) + self.calls / 10


def floats(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in state.items()}


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("reentrant", [False, True])
def test_statistics_inside_a_users_own_checkpoint_move_once_a_step(
    group: Group, reentrant: bool
) -> None:
    for micro_batch in (0, 4):
        settings = Settings(micro_batch=micro_batch, max_steps=4)
        kept, again = (
            trace(
                group,
                recipe(
                    settings,
                    model=lambda again=again: Recomputed(again=again, reentrant=reentrant),
                ),
                settings,
            )
            for again in (False, True)
        )
        assert int(again.state["norm.num_batches_tracked"]) == 4
        assert distance(floats(again.state), floats(kept.state)) <= 1e-12
        assert again.losses == pytest.approx(kept.losses, abs=1e-12)


# Exact


def own_loop(threads: int, exact: bool) -> str:
    with ddp_kit.process_group(device="cpu", threads=threads) as group:
        torch.manual_seed(0)
        model = nn.Linear(6, 4)
        feed = ddp_kit.build_loader(Data(vectors()), group=group, global_batch=24, micro_batch=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            ddp_kit.wrap(model, optimizer, classify, group=group, feed=feed, exact=exact)
        except ConfigError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loop_of_ones_own_is_exact_only_with_a_stated_number_of_threads(ranks: int) -> None:
    for said in run_ranks(own_loop, ranks, 0, True, group=False):
        assert "process_group(threads=1)" in said
    assert run_ranks(own_loop, ranks, 0, False, group=False) == [""] * ranks
    assert run_ranks(own_loop, ranks, 1, True, group=False) == [""] * ranks


class Wide(nn.Module):
    """Several of DDP's buckets, and several graphs; what a compiler fuses sums in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 8, 3, padding=1)
        self.first = nn.Linear(6, 700)
        self.norm = nn.BatchNorm1d(700)
        self.second = nn.Linear(700, 700)
        self.layer_norm = nn.LayerNorm(700)
        self.third = nn.Linear(700, 700)
        self.last = nn.Linear(700, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.convolution(x[:, None]).mean(1)
        x = self.norm(self.first(x)).relu()
        torch._dynamo.graph_break()
        x = nn.functional.dropout(nn.functional.gelu(self.layer_norm(self.second(x))), 0.2)
        torch._dynamo.graph_break()
        return self.last(torch.softmax(self.third(x), -1) * 700)


def compiled(settings: Settings) -> tuple[str, list[Any]]:
    # Of torch's own, in compiling what stands between two graphs.
    warnings.simplefilter("ignore")
    life = live(lambda own: recipe(own, model=Wide, eval_data=lambda: Data(vectors(23))), settings)
    digest = hashlib.sha256()
    for value in life.state.values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest(), [record["loss"].hex() for record in life.records if "loss" in record]


@pytest.mark.slow
def test_compiled_models_are_exact_on_any_number_of_ranks(tmp_path: Path) -> None:
    settings = Settings(
        global_batch=32,
        micro_batch=4,
        max_steps=4,
        precision="fp32",
        exact=True,
        threads=1,
        compile=True,
        eval_every=1,
        log_every=1,
    )
    found = []
    for ranks in (1, 2, 4):
        own = replace(settings, run_dir=str(tmp_path / str(ranks)))
        found.append(run_ranks(compiled, ranks, own, group=False, deadline_s=400))
    for lives in found:
        assert lives[0] == found[0][0]
        assert {digest for digest, _ in lives} == {found[0][0][0]}
