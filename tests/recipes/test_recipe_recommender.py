"""The recommender finds tastes, its negatives are items that a user has not met, and its ranking is that of a plain loop over all users."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shipped
import torch
from safetensors.torch import load_file

from ddp_kit.cli import main
from ddp_kit.data.seeding import Draws
from ddp_kit.errors import ConfigError

SIZES = {"users": 501, "items": 100, "dimension": 16}  # 501: no number of ranks divides it
SMALL = (
    "--users",
    "501",
    "--items",
    "100",
    "--dimension",
    "16",
    "--global-batch",
    "128",
    "--lr",
    "0.03",
    "--epochs",
    "4",
)


def made(**changes: Any) -> Any:
    return shipped.made("recommender", **(SIZES | changes))


def met_of(data: Any) -> list[set[int]]:
    """Returns the items that each user met in training."""
    users, items = (tensor.tolist() for tensor in data.dataset.tensors)
    met: list[set[int]] = [set() for _ in range(SIZES["users"])]
    for user, item in zip(users, items, strict=True):
        met[user].add(item)
    return met


def by_hand(model: Any, met: list[set[int]], held_out: list[int]) -> tuple[float, float]:
    """Returns hit rate and NDCG at 10, user by user."""
    hits = gains = 0.0
    for user, target in enumerate(held_out):
        others = [item for item in range(SIZES["items"]) if item not in met[user]]
        scores = model(torch.tensor([user]), torch.tensor([others]))[0].tolist()
        best = [item for _, item in sorted(zip(scores, others, strict=True), reverse=True)][:10]
        hits += target in best
        gains += 1 / np.log2(best.index(target) + 2) if target in best else 0
    return hits / len(held_out), gains / len(held_out)


def popular(met: list[set[int]], held_out: list[int]) -> float:
    """Returns the hit rate of showing each user the ten items most often met that he has not met."""
    order = np.argsort(
        -np.bincount([item for own in met for item in own], minlength=SIZES["items"]), kind="stable"
    ).tolist()
    return float(
        np.mean(
            [
                target in [item for item in order if item not in met[user]][:10]
                for user, target in enumerate(held_out)
            ]
        )
    )


def test_it_beats_popularity_the_same_on_two_ranks_and_ranks_as_a_plain_loop_does(
    tmp_path: Path,
) -> None:
    shipped.assert_same_numbers("recommender", *SMALL, "--precision", "fp64", tmp_path=tmp_path)
    runs = [
        shipped.Ended(codes=[], outputs=[], errors="", run_dir=tmp_path / f"ranks-{size}" / "run")
        for size in (1, 2)
    ]
    for name in ("hr@10", "ndcg@10"):
        one, two = (shipped.values(run, name, kind="eval") for run in runs)
        assert one == pytest.approx(two, abs=1e-12)
    recipe = made()
    met, held_out = met_of(recipe.train_data()), recipe.eval_data().tensors[1].tolist()
    assert (
        main.main(
            ["ckpt", "export", str(runs[1].run_dir), "--out", str(tmp_path / "model.safetensors")]
        )
        == 0
    )
    model = recipe.model().double()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    found = (
        shipped.values(runs[1], "hr@10", kind="eval")[-1],
        shipped.values(runs[1], "ndcg@10", kind="eval")[-1],
    )
    assert found == pytest.approx(by_hand(model, met, held_out), abs=1e-9)
    assert found[0] > 1.3 * popular(met, held_out)


def test_a_model_that_scores_all_alike_hits_nothing() -> None:
    recipe = made()
    model = recipe.model()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    sums = recipe.evaluate(model, recipe.eval_data().tensors)
    assert {name: (float(total), count) for name, (total, count) in sums.items()} == {
        "hr@10": (0, 501),
        "ndcg@10": (0, 501),
    }


def test_negatives_are_drawn_evenly_from_what_a_user_has_not_met() -> None:
    data = made(negatives=400).train_data()
    met = met_of(data)
    chosen = np.arange(0, len(data.dataset), 97)
    users, _, negatives = data.augment(
        tuple(tensor[chosen] for tensor in data.dataset.tensors), Draws(0, 0, chosen)
    )
    for user, row in zip(users.tolist(), negatives.tolist(), strict=True):
        assert set(row) <= set(range(100)) - met[user]
    log = sys.modules["recommender"].make_log(users=501, items=100)
    for user in range(0, 501, 50):  # one number for each item that is left: each of them once
        left = 100 - len(met[user])
        items = log.not_met(np.array([user]), (np.arange(left)[None, :] + 0.5) / left)
        assert items[0].tolist() == sorted(set(range(100)) - met[user])


def test_the_held_out_items_are_in_no_other_part() -> None:
    recipe = made()
    met = met_of(recipe.train_data())
    validation, test = recipe.eval_data().tensors, recipe.test_data().tensors
    for user, own in enumerate(met):
        left, later = int(validation[1][user]), int(test[1][user])
        assert left not in own
        assert later not in own | {left}
        assert set(validation[2][user].nonzero().flatten().tolist()) == own
        assert set(test[2][user].nonzero().flatten().tolist()) == own | {left}


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    shipped.assert_goes_on_bit_for_bit(
        "recommender",
        *SMALL,
        "--max-steps",
        "12",
        "--save-every",
        "5",
        "--eval-every",
        "6",
        tmp_path=tmp_path,
        deaths="8:1",
    )


@pytest.mark.slow
def test_exact_gives_the_same_bits(tmp_path: Path) -> None:
    shipped.assert_exact(
        "recommender", *SMALL, "--micro-batch", "32", "--max-steps", "12", tmp_path=tmp_path
    )


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="--items of 32 or more"):
        made(items=20)
