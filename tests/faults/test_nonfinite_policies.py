"""A loss or gradient that is not finite, and one far too large: the run ends, or all ranks leave the step out, at once or from the last checkpoint."""

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_runs import (
    BATCH,
    Ended,
    Fault,
    bad_data,
    bad_places,
    lines,
    scheduled,
    spoilt,
    trained,
    trained_as,
)
from cases import Settings, distance, normed, plain, recipe, vectors
from gans import gan
from mortal import Counted
from torch.optim.lr_scheduler import ExponentialLR

from ddp_kit import LossSum
from ddp_kit.data.seeding import permutation
from ddp_kit.testing import RanksError, run_ranks
from ddp_kit.train import run

SLOW = [pytest.mark.slow, pytest.mark.steady]
BASE = Settings(max_steps=9, save_every=3, micro_batch=4, log_every=1, precision="fp32")


def ends(world_size: int, settings: Settings, *given: Any, **others: Any) -> list[Ended]:
    return run_ranks(trained, world_size, settings, *given, group=False, deadline_s=120)


def in_folder(settings: Settings, folder: Path, **changes: Any) -> Settings:
    return replace(settings, run_dir=str(folder), **changes)


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        ("skip", "nan"),
        ("rollback", "gradient"),
        pytest.param("skip", "gradient", marks=SLOW),
        pytest.param("rollback", "nan", marks=SLOW),
    ],
)
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


@pytest.mark.parametrize(
    ("policy", "world_size"),
    [
        ("skip", 1),
        ("rollback", 2),
        pytest.param("skip", 2, marks=SLOW),
        pytest.param("rollback", 1, marks=SLOW),
    ],
)
def test_what_is_left_out_is_left_out_of_a_bare_loop(
    tmp_path: Path, policy: str, world_size: int
) -> None:
    settings = in_folder(BASE, tmp_path, precision="fp64", on_nonfinite=policy, micro_batch=0)
    for state in run_ranks(last_weights, world_size, settings, [4, 5], group=False):
        assert distance(state, by_hand({4, 5})) <= 1e-12
        assert distance(state, by_hand({4})) > 1e-6


def test_stop_is_the_default_and_one_step_more_than_may_be_dropped_ends_the_run(
    tmp_path: Path,
) -> None:
    stopped = ends(2, in_folder(BASE, tmp_path / "stop"), Fault(), [5])
    assert {end.error.split(",")[0] for end in stopped} == {
        "the loss of step 5 is not finite on rank 1"
    }
    settings = in_folder(BASE, tmp_path / "cap", on_nonfinite="skip", max_dropped=2)
    for end in ends(2, settings, Fault(), [2, 5, 7]):
        assert end.error.startswith("NOT FINITE at step 7: loss nan on rank 1, micro-batch 5, ")
        assert "2 steps have been dropped before it, and --max-dropped is 2" in end.error
    assert [event["step"] for event in ends_of(tmp_path / "cap", "not_finite")] == [2, 5]
    # It goes on once more may be dropped: what was counted is in the checkpoint.
    (end,) = ends(1, replace(settings, max_dropped=3), Fault(), [2, 5, 7])
    assert end.error == ""
    assert end.of("not_finite")[-1]["message"].endswith("(3 of at most 3)")


def ends_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(folder / "events.jsonl") if event["event"] == kind]


@pytest.mark.parametrize("policy", [pytest.param("skip", marks=SLOW), "rollback"])
@pytest.mark.parametrize(
    ("precision", "strategy", "kind"),
    [
        pytest.param("bf16", "ddp", "nan", marks=SLOW),
        ("fp16", "ddp", "inf"),
        pytest.param("fp32", "zero1", "gradient", marks=SLOW),
        pytest.param("fp32", "fsdp", "nan", marks=SLOW),
        pytest.param("fp32", "fsdp", "gradient", marks=SLOW),
    ],
)
def test_a_fault_that_strikes_once_leaves_no_trace_of_its_step(
    tmp_path: Path, policy: str, precision: str, strategy: str, kind: str
) -> None:
    settings = in_folder(
        BASE, tmp_path / "bad", on_nonfinite=policy, precision=precision, strategy=strategy
    )
    model = plain if strategy == "fsdp" else normed
    bad = ends(2, settings, Fault(kind, rank=1, step=5), (), (), model)
    good = ends(2, in_folder(settings, tmp_path / "good"), Fault(), (), [5], model)
    assert {end.error for end in [*bad, *good]} == {""}
    assert len({end.digest for end in [*bad, *good]}) == 1
    (event,) = bad[0].of("not_finite")
    assert event["step"] == 5
    # It was no overflow, of which fp16's loss scale would learn.
    scales = {record["loss_scale"] for record in bad[0].records if "loss_scale" in record}
    assert scales == ({2.0**16} if precision == "fp16" else set())
    # A gradient is looked into by computing it again, where a rank has the whole model.
    told = {
        ("fsdp", "gradient"): "where ranks hold parts of the weights; ",
        ("zero1", "gradient"): "no micro-batch has it when it is computed again; ",
    }.get((strategy, kind), f"loss {kind} on rank 1, micro-batch 3, samples ")
    assert told in event["message"]


@pytest.mark.parametrize("world_sizes", [(2, 4), pytest.param((1, 2), marks=SLOW)])
def test_killed_after_it_went_back_a_run_still_leaves_the_step_out_on_any_number_of_ranks(
    tmp_path: Path, world_sizes: tuple[int, int]
) -> None:
    settings = in_folder(
        BASE, tmp_path / "bad", exact=True, micro_batch=3, on_nonfinite="rollback", save_every=4
    )
    # It goes back from step 7 to step 4, and is killed after its second step 5.
    fault = Fault("nan", rank=0, step=7, deaths={(5, 2): 0})
    with pytest.raises(RanksError, match="SIGKILL"):
        ends(world_sizes[0], settings, fault)
    # Where it goes on nothing is bad any more: only the list tells.
    resumed = ends(world_sizes[1], settings, Fault())
    good = ends(1, in_folder(settings, tmp_path / "good"), Fault(), (), [7])
    assert {end.error for end in [*resumed, *good]} == {""}
    assert {end.digest for end in resumed} == {good[0].digest}
    assert resumed[0].seen[0] == 5
    other = ends(1, in_folder(settings, tmp_path / "other"), Fault())
    assert other[0].digest != good[0].digest


@pytest.mark.slow
@pytest.mark.steady
def test_where_two_steps_are_bad_each_is_traced_to_its_own_rank(tmp_path: Path) -> None:
    """What a loss has told of its rank says nothing of a gradient that is bad later."""
    settings = in_folder(BASE, tmp_path, on_nonfinite="skip")
    data = partial(bad_places, {3: 23, 7: 1})
    (first, second) = ends(2, settings, Fault("nan gradient"), (), (), normed, data)[0].of(
        "not_finite"
    )
    assert (first["step"], first["rank"], first["value"]) == (3, 1, "nan")
    assert (second["step"], second["rank"], second["micro_batch"]) == (7, 0, 0)
    assert second["parameters"]


@pytest.mark.slow
@pytest.mark.steady
@pytest.mark.parametrize("step", [2, 6])
def test_data_with_a_state_of_their_own_go_back_too(tmp_path: Path, step: int) -> None:
    settings = in_folder(BASE, tmp_path / "bad", on_nonfinite="rollback")
    bad = ends(2, settings, Fault("nan", rank=1, step=step + 1), (), (), normed, Counted)
    good = ends(2, in_folder(settings, tmp_path / "good"), Fault(), (), [step + 1], normed, Counted)
    assert {end.error for end in [*bad, *good]} == {""}
    assert len({end.digest for end in [*bad, *good]}) == 1
    assert bad[0].of("rollback")[0]["step"] == step - step % 3


@pytest.mark.slow
@pytest.mark.steady
def test_a_run_goes_back_to_what_it_was_changed_to_on_purpose(tmp_path: Path) -> None:
    """Not to the checkpoint of the attempt before, which had another rate; with loader workers, and evaluations."""
    found = []
    for name, fault, unseen in (("bad", Fault("nan", rank=0, step=7), []), ("good", Fault(), [7])):
        first = in_folder(BASE, tmp_path / name, max_steps=4, save_every=0)
        assert {end.error for end in ends(2, first, Fault())} == {""}
        changed = replace(first, lr=0.03, max_steps=9, change=("lr", "max_steps"), num_workers=1)
        found.append(ends(2, replace(changed, on_nonfinite="rollback"), fault, (), unseen))
    bad, good = found
    assert {end.error for end in [*bad, *good]} == {""}
    assert len({end.digest for end in [*bad, *good]}) == 1
    assert [event["step"] for event in bad[0].of("rollback")] == [4]
    assert bad[0].records == [
        {**mine, **timed(theirs)}
        for mine, theirs in zip(good[0].records, bad[0].records, strict=True)
    ]


def timed(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the machine."""
    names = ("samples_per_s", "data_wait", "peak_memory_mib")
    return {name: record[name] for name in names if name in record}


@pytest.mark.slow
@pytest.mark.steady
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_with_deepspeed_a_step_is_left_out_too(tmp_path: Path, policy: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    settings = in_folder(BASE, tmp_path / "bad", on_nonfinite=policy, strategy="deepspeed")
    bad = ends(2, settings, Fault("nan", rank=1, step=5), (), (), plain)
    good = ends(2, in_folder(settings, tmp_path / "good"), Fault(), (), [5], plain)
    assert {end.error for end in [*bad, *good]} == {""}
    assert len({end.digest for end in [*bad, *good]}) == 1


@pytest.mark.slow
@pytest.mark.steady
def test_before_its_first_save_a_run_goes_back_to_where_it_began(tmp_path: Path) -> None:
    settings = in_folder(BASE, tmp_path / "bad", on_nonfinite="rollback", save_every=0)
    bad = ends(2, settings, Fault("nan", rank=1, step=4))
    good = ends(2, in_folder(settings, tmp_path / "good"), Fault(), (), [4])
    assert {end.digest for end in bad} == {good[0].digest}
    assert bad[0].seen == [1, 2, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    "policy", [pytest.param("stop", marks=SLOW), "skip", pytest.param("rollback", marks=SLOW)]
)
def test_a_gradient_far_too_large_is_dropped_the_same_way_and_the_window_outlives_a_kill(
    tmp_path: Path, policy: str
) -> None:
    settings = in_folder(
        BASE, tmp_path / "bad", on_spike=policy, spike_window=8, max_steps=14, save_every=4
    )
    settings = replace(settings, precision="fp64", micro_batch=0, lr=0.02)
    fault = Fault("spike", rank=1, step=12, deaths={(10, 1): 0})
    with pytest.raises(RanksError, match="SIGKILL"):
        ends(2, settings, fault)
    bad = ends(2, settings, replace(fault, deaths={}))
    if policy == "stop":
        assert {end.error[:44] for end in bad} == {
            "SPIKE at step 12: gradient norm " + bad[0].error[32:44]
        }
        assert "--spike-z is 20" in bad[0].error
        return
    good = ends(2, in_folder(settings, tmp_path / "good"), Fault(), (), [12])
    assert {end.error for end in [*bad, *good]} == {""}
    assert len({end.digest for end in [*bad, *good]}) == 1
    (event,) = bad[0].of("spike")
    assert (event["step"], event["z"] > 20) == (12, True)


def unhinged(settings: Settings, after: int) -> Ended:
    """A GAN whose generator's loss, the second one, is nan once."""
    fault = Fault(step=after)
    first, second = gan().objectives

    def loss(model: Any, batch: Any) -> LossSum:
        result = second.loss(model, batch)
        if fault.now == after - 1 and not fault.has_struck and fault.now:
            fault.has_struck = True
            return LossSum(result.total * torch.nan, result.count)
        return result

    made = replace(gan(), objectives=[first, replace(second, loss=loss)], callbacks=[fault])
    return trained_as(made, settings, fault, [] if after else [5])


def test_half_a_step_is_not_skipped_but_gone_back_over(tmp_path: Path) -> None:
    settings = in_folder(Settings(max_steps=7, save_every=3), tmp_path / "a", on_nonfinite="skip")
    (refused,) = run_ranks(unhinged, 1, settings, 5, group=False)
    assert refused.error.endswith("Type --on-nonfinite rollback, which leaves out the whole step.")
    settings = replace(settings, on_nonfinite="rollback")
    bad = run_ranks(unhinged, 2, in_folder(settings, tmp_path / "b"), 5, group=False)
    good = run_ranks(unhinged, 2, in_folder(settings, tmp_path / "c"), 0, group=False)
    assert {end.error for end in [*bad, *good]} == {""}
    assert len({end.digest for end in [*bad, *good]}) == 1
