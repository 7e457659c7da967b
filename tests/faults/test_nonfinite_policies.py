"""A loss or gradient that is not finite, and one far too large: the run ends, or all ranks leave the step out, at once or from the last checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_runs import BATCH, Ended, Fault, bad_data, spoilt, trained
from cases import Settings, distance, plain, vectors
from torch.optim.lr_scheduler import ExponentialLR

from ddp_kit.data.seeding import permutation
from ddp_kit.testing import run_ranks
from ddp_kit.train import run

BASE = Settings(max_steps=9, save_every=3, micro_batch=4, log_every=1, precision="fp32")


def ends(world_size: int, settings: Settings, *given: Any, **others: Any) -> list[Ended]:
    return run_ranks(trained, world_size, settings, *given, group=False, deadline_s=120)


def in_folder(settings: Settings, folder: Path, **changes: Any) -> Settings:
    return replace(settings, run_dir=str(folder), **changes)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize("kind", ["nan", "gradient"])
def test_a_bad_step_is_left_out_as_in_the_run_that_never_saw_it(
    tmp_path: Path, policy: str, kind: str
) -> None:
    settings = in_folder(BASE, tmp_path / "bad", on_nonfinite=policy, ema=0.9)
    bad = ends(2, settings, Fault(kind), [5, 8])
    good = ends(2, in_folder(settings, tmp_path / "good"), Fault(), [5, 8], [5, 8])
    assert {end.error for end in [*bad, *good]} == {""}
    assert len({end.digest for end in [*bad, *good]}) == 1
    first, second = bad[0].of("not_finite")
    done = {
        "skip": "skipped on all ranks",
        "rollback": "left out on all ranks, back to the last checkpoint",
    }
    sample = permutation(0, 0, 240)[4 * BATCH + BATCH - 1]
    assert (first["step"], second["step"], first["rank"], first["micro_batch"]) == (5, 8, 1, 5)
    assert int(sample) in first["samples"]
    found = "loss nan on rank 1" if kind == "nan" else "though the loss is finite, on rank 1"
    assert first["message"].startswith("NOT FINITE at step 5: ")
    assert f"{found}, micro-batch 5, samples " in first["message"]
    assert first["message"].endswith(f"; {done[policy]} (1 of at most 10)")
    assert second["message"].endswith("(2 of at most 10)")
    backs = [event["step"] for event in bad[0].of("rollback")]
    assert backs == ([3, 6] if policy == "rollback" else [])
    # Records are those of one run: each step once, none of what was left out.
    steps = [record["step"] for record in bad[0].records if record["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 6, 7, 9]
    assert all(isinstance(record["loss_mean"], float) for record in bad[0].records)


def by_hand(leaving_out: set[int]) -> dict[str, torch.Tensor]:
    """A bare loop of one process on whole batches."""
    torch.manual_seed(0)
    model = plain().double()
    model.load_state_dict(first_weights())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = ExponentialLR(optimizer, gamma=0.9)
    inputs, labels = vectors().tensors
    order = permutation(0, 0, 240)
    for step in range(1, 10):
        if step not in leaving_out:
            samples = order[(step - 1) * BATCH : step * BATCH]
            optimizer.zero_grad()
            batch = (inputs[samples].double(), labels[samples])
            (
                spoilt("", model, batch, rows=torch.zeros(BATCH, dtype=torch.bool)).total / BATCH
            ).backward()
            optimizer.step()
        optimizer._opt_called = True  # type: ignore[attr-defined]  # as of a step that was taken
        scheduler.step()
    return model.state_dict()


def first_weights() -> dict[str, torch.Tensor]:
    """What `plain` begins with in every test here."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return plain().double().state_dict()


def seeded() -> torch.nn.Module:
    model = plain()
    model.load_state_dict(first_weights())
    return model


def last_weights(settings: Settings, policy_steps: list[int]) -> dict[str, torch.Tensor]:
    from bad_runs import scheduled
    from cases import recipe

    fault = Fault("inf")
    made = recipe(
        settings,
        model=seeded,
        loss=fault.loss,
        train_data=lambda: bad_data(policy_steps),
        scheduler=scheduled,
        callbacks=[fault],
    )
    return run(made, settings).model.state_dict()


@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_left_out_is_left_out_of_a_bare_loop(
    tmp_path: Path, policy: str, world_size: int
) -> None:
    settings = in_folder(BASE, tmp_path, precision="fp64", on_nonfinite=policy, micro_batch=0)
    for state in run_ranks(last_weights, world_size, settings, [4, 5], group=False):
        assert distance(state, by_hand({4, 5})) <= 1e-12
        assert distance(state, by_hand({4})) > 1e-6
