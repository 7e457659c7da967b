"""What other people's `evaluate` and `summarize` return: it counts, or it is named; it never vanishes, and never aborts."""

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Settings, classify, recipe, vectors
from gans import gan
from torch import nn
from torch.utils.data import TensorDataset

from ddp_kit import LossSum, Recipe
from ddp_kit.data.loader import evaluation_batches
from ddp_kit.distributed.collectives import gather_bytes
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, DataError, DdpKitError
from ddp_kit.settings import EarlyStop
from ddp_kit.setup.build import build
from ddp_kit.testing import RanksError, run_ranks
from ddp_kit.train import run
from ddp_kit.training.evaluation import evaluate


def evaluated(group: Group, measure: Any, *, samples: int = 17, **more: Any) -> dict[str, float]:
    """Returns the metrics of so many samples, each its own index, in micro-batches of 4."""
    data = TensorDataset(torch.arange(samples))
    batches = evaluation_batches(data, group=group, micro_batch=4)
    return evaluate(nn.Flatten(), batches, group=group, measure=measure, **more)


def pairs(own: torch.Tensor) -> dict[str, Any]:
    """Returns one pair, of a sum of 136 over a count of 17 in all, in the forms in which people write it."""
    total = own.sum()
    count = len(own)
    return {
        "tuple": (total, count),
        "list": [total, count],
        "floats": [float(total), float(count)],
        "zeros": (total.double(), torch.tensor(count)),
        "ones": (total.reshape(1), torch.tensor([[count]])),
        "numpy": (np.float32(total), np.int64(count)),
        "arrays": [np.array(float(total)), np.array([count])],
        "bools": [total, sum(True for _ in range(count))],
    }


@pytest.mark.ranks(1, 2)
def test_a_pair_counts_in_each_form_that_people_write(group: Group) -> None:
    found = evaluated(group, lambda model, batch: pairs(batch[0]))
    assert found == dict.fromkeys(pairs(torch.arange(1)), 136 / 17)


WRONG = [
    (0.5, "of type float"),
    ("0.5", "the text '0.5'"),
    (None, "None"),
    ({"sum": 1.0}, "of type dict"),
    (("1", "4"), r"a tuple of 2 \(the text '1', the text '4'\)"),
    ((1.0, 2, 3), "a tuple of 3"),
    ((1.0,), "a tuple of 1"),
    ([0.25, 0.5, 0.25, 0.125], "a list of 4"),
    ((torch.ones(4), 4), r"a tuple of 2 \(a tensor of shape \(4,\), of type int\)"),
    ((1 + 2j, 4), "of type complex"),
    (np.array(["cat", "dog", "cow", "hen"]), "an array of <U3"),
    (np.array([1, "x", None, 2], dtype=object), "an array of object"),
    (torch.ones(4).to_sparse(), "a tensor of shape"),
]


@pytest.mark.ranks(1, 2)
def test_an_answer_of_another_kind_is_named_before_the_first_step_and_later(group: Group) -> None:
    for value, words in WRONG:

        def measure(model: Any, batch: Any, value: Any = value) -> dict[str, Any]:
            return {"accuracy": value}

        named = rf"evaluate: 'accuracy' is .*{words}.*; expected a pair \(sum, count\)"
        made = recipe(Settings(), evaluate=measure, eval_data=lambda: vectors(8))
        with pytest.raises(DdpKitError, match=named):
            build(made, Settings(micro_batch=4), group)
        with pytest.raises(DdpKitError, match=named):
            evaluated(group, measure)


@pytest.mark.ranks(1, 2)
def test_an_evaluate_that_returns_no_mapping_is_named(group: Group) -> None:
    for value, words in (
        (None, "None"),
        (0.5, "of type float"),
        ([("loss", 1.0)], "a list"),
        (torch.ones(4), "a tensor of shape"),
    ):
        with pytest.raises(DdpKitError, match=f"evaluate must return .*; it returned {words}"):
            evaluated(group, lambda model, batch, value=value: value)
    with pytest.raises(DdpKitError, match="a metric is named 3; a name is a text"):
        evaluated(group, lambda model, batch: {3: (1.0, 1)})


@pytest.mark.ranks(1, 2)
def test_a_later_micro_batch_with_another_kind_of_answer_is_named(group: Group) -> None:
    def changing(model: Any, batch: Any) -> dict[str, Any]:
        own = batch[0]
        return {"index": own if own[0] // 4 in (0, 3, 5, 6) else (own.sum(), 1)}

    def vanishing(model: Any, batch: Any) -> dict[str, Any]:
        own = batch[0]
        return {"sum": (own.sum(), 1)} | ({"index": own} if own[0] % 16 in (0, 4) else {})

    with pytest.raises(
        DdpKitError, match=r"'index' is (a pair|rows) in one micro-batch, (a pair|rows)"
    ):
        evaluated(group, changing, samples=32)
    with pytest.raises(DataError, match=r"samples of rank \d have no row of 'index'"):
        evaluated(group, vanishing, samples=32)


@pytest.mark.ranks(1, 2)
def test_rows_that_differ_in_shape_or_dtype_are_named_on_all_ranks(group: Group) -> None:
    """They are as long as the longest of their micro-batch; or halves where a rank has a better machine."""

    def ragged(model: Any, batch: Any) -> dict[str, Any]:
        return {"logits": torch.zeros(len(batch[0]), 3 + int(batch[0][0]) // 4)}

    def by_rank(model: Any, batch: Any) -> dict[str, Any]:
        return {"logits": torch.zeros(len(batch[0]), 3 + group.rank)}

    def of_two_dtypes(model: Any, batch: Any) -> dict[str, Any]:
        own = batch[0]
        return {"logits": own.float() if own[0] < 4 else own.double()}

    for measure in (ragged, by_rank, of_two_dtypes):
        if measure is by_rank and group.world_size == 1:
            continue
        with pytest.raises(DataError, match="rows of 'logits' differ: float32 of shape") as error:
            evaluated(group, measure)
        message = str(error.value).encode()
        assert set(gather_bytes(group, message)) == {message}
        if group.world_size > 1:
            assert b"on rank 0" in message
            assert (b"on rank 1" in message) == (measure is not of_two_dtypes)


@pytest.mark.ranks(1, 2)
def test_what_a_rank_reads_as_padding_decides_nothing(group: Group) -> None:
    """Rank 1 has no sample, and runs another one's forward pass: longer rows than there are."""
    found: dict[str, torch.Tensor] = {}

    def measure(model: Any, batch: Any) -> dict[str, Any]:
        return {"row": torch.ones(len(batch[0]), 5 + group.rank)}

    def summarize(means: Any, rows: Mapping[str, torch.Tensor]) -> dict[str, float]:
        found.update(rows)
        return {}

    assert evaluated(group, measure, samples=3, summarize=summarize) == {}
    if group.rank == 0:
        assert found["row"].shape == (3, 5)


DTYPES = [
    *("float16", "bfloat16", "float32", "float64", "complex64", "bool", "uint8"),
    *("int8", "int16", "int32", "int64", "uint16"),
]


@pytest.mark.ranks(1, 2)
def test_rows_of_any_dtype_and_numpy_arrays_are_rows(group: Group) -> None:
    found: dict[str, torch.Tensor] = {}

    def measure(model: Any, batch: Any) -> dict[str, Any]:
        own = batch[0] % 2
        tensors = {name: own.to(getattr(torch, name)) for name in DTYPES}
        return tensors | {"array": own.numpy()[:, None], "none": torch.zeros(len(own), 0)}

    def summarize(means: Any, rows: Mapping[str, torch.Tensor]) -> dict[str, float]:
        found.update(rows)
        return {}

    evaluated(group, measure, summarize=summarize)
    if group.rank == 0:
        for name in DTYPES:
            assert found[name].dtype == getattr(torch, name)
            assert found[name].to(torch.complex64).tolist() == [i % 2 for i in range(17)]
        assert found["array"].shape == (17, 1)
        assert found["none"].shape == (17, 0)


@pytest.mark.ranks(1, 2)
def test_rank_0s_summary_is_everybodys(group: Group) -> None:
    """A bootstrap: draws of all generators, the same at each evaluation and no trace of them after it."""

    def summarize(means: Any, rows: Any) -> dict[str, Any]:
        return {
            "drawn": random.random() + float(np.random.rand()) + torch.rand(1).item(),
            "by_rank": group.rank,
            "tensor": torch.tensor([0.25]),
            "array": np.float32(0.5),
            "inf": math.inf,
            "nan": np.nan,
        }

    random.seed(group.rank)
    torch.manual_seed(group.rank)
    state = (torch.get_rng_state().tolist(), random.getstate())
    first = evaluated(group, lambda model, batch: {"sum": (1.0, 1)}, summarize=summarize)
    again = evaluated(group, lambda model, batch: {"sum": (1.0, 1)}, summarize=summarize)
    other = evaluated(group, lambda model, batch: {"sum": (1.0, 1)}, summarize=summarize, seed=1)
    assert (torch.get_rng_state().tolist(), random.getstate()) == state
    assert first["drawn"] == again["drawn"] != other["drawn"]
    assert (first["by_rank"], first["tensor"], first["array"]) == (0.0, 0.25, 0.5)
    assert math.isinf(first["inf"])
    assert math.isnan(first["nan"])
    said = json.dumps(first).encode()
    assert set(gather_bytes(group, said)) == {said}


@pytest.mark.ranks(1, 2)
def test_a_summary_of_another_kind_is_named_on_all_ranks(group: Group) -> None:
    for summary, words in (
        (None, r"summarize must return \{name: float\}; it returned None"),
        ({"f1": "0.5"}, "summarize: 'f1' is the text '0.5'; expected a number"),
        ({"f1": torch.ones(4)}, r"'f1' is a tensor of shape \(4,\)"),
        ({"f1": None}, "'f1' is None"),
        ({"step": 1.0}, "summarize: a metric cannot be named 'step'"),
    ):
        with pytest.raises(DdpKitError, match=words):
            evaluated(
                group,
                lambda model, batch: {"sum": (1.0, 1)},
                summarize=lambda means, rows, summary=summary: summary,
            )


@pytest.mark.ranks(1, 2)
def test_a_metric_named_as_a_field_of_the_record_is_refused_at_start(group: Group) -> None:
    """It would be another step, another kind of record, or never be seen."""
    settings = Settings(micro_batch=4)
    for name in ("step", "kind", "epoch", "samples", "samples_per_s", "time"):

        def measure(model: Any, batch: Any, name: str = name) -> dict[str, Any]:
            return classify(model, batch).sums() | {name: (1.0, 1)}

        made = recipe(settings, evaluate=measure, eval_data=lambda: vectors(8))
        with pytest.raises(DdpKitError, match=f"evaluate: a metric cannot be named '{name}'.*kind"):
            build(made, settings, group)
    for name in ("step", "kind", "loss", "loss_mean", "lr", "grad_norm", "skipped", "mfu"):

        def loss(model: nn.Module, batch: Any, name: str = name) -> LossSum:
            found = classify(model, batch)
            return LossSum(found.total, found.count, metrics={name: (1.0, 1)})

        with pytest.raises(DdpKitError, match=f"loss's metrics: a metric cannot be named '{name}'"):
            build(recipe(settings, loss=loss), settings, group)


@pytest.mark.ranks(1)
def test_a_metric_of_the_loss_that_is_no_pair_is_named_at_start(group: Group) -> None:
    for value, words in (
        (0.5, "of type float"),
        ("ab", "the text"),
        ((torch.ones(3), 3), "a tuple"),
    ):

        def loss(model: nn.Module, batch: Any, value: Any = value) -> LossSum:
            found = classify(model, batch)
            return LossSum(found.total, found.count, metrics={"accuracy": value})

        with pytest.raises(DdpKitError, match=f"loss's metrics: 'accuracy' is {words}"):
            build(recipe(Settings(), loss=loss), Settings(), group)


@pytest.mark.ranks(1)
def test_what_is_evaluated_by_default_and_by_parts_keeps_its_names(group: Group) -> None:
    made = build(recipe(Settings(), eval_data=lambda: vectors(8)), Settings(), group)
    assert set(made.evaluator.names) == {"loss", "accuracy"}
    with pytest.raises(ConfigError, match="named 'test'"):
        build(
            recipe(
                Settings(),
                eval_data=lambda: {"test": vectors(8)},
                test_data=lambda: vectors(8),
            ),
            Settings(),
            group,
        )
    assert gan().objectives


def failing(settings: Settings) -> Recipe:
    def summarize(means: Any, rows: Any) -> dict[str, float]:
        raise ZeroDivisionError("no positive sample")

    return recipe(settings, eval_data=lambda: vectors(10), summarize=summarize)


def trained(make: Any, settings: Settings) -> tuple[str, int, dict[str, float]]:
    outcome = run(make(settings), settings)
    return outcome.reason, outcome.step, dict(outcome.metrics)


def test_an_error_of_summarize_ends_all_ranks_by_its_name(tmp_path: Path) -> None:
    settings = Settings(run_dir=str(tmp_path / "run"), max_steps=2)
    with pytest.raises(RanksError):
        run_ranks(trained, 2, failing, settings, group=False)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"] == "failed"
    # All ranks fail alike, and one of them first.
    assert status["reason"].endswith("ZeroDivisionError: no positive sample")


def drawing(settings: Settings) -> Recipe:
    """Scores that each rank draws from a generator of its own."""
    own = random.SystemRandom()

    def summarize(means: Any, rows: Any) -> dict[str, float]:
        return {"score": own.random()}

    return recipe(settings, eval_data=lambda: vectors(10), summarize=summarize)


def test_early_stopping_and_best_agree_where_summarize_draws(tmp_path: Path) -> None:
    settings = Settings(
        run_dir=str(tmp_path / "run"),
        max_steps=60,
        eval_every=1,
        early_stop=EarlyStop(metric="score", mode="max", patience=2),
    )
    first, second = run_ranks(trained, 2, drawing, settings, group=False)
    assert first == second
    assert first[1] < 60
