"""Evaluation: every sample exactly once at any world size, means over counts, rows in sample order."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from cases import Settings, classify, normed, plain, recipe, vectors
from lives import lives
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from ddp_kit import Data, Objective, Recipe
from ddp_kit.data.loader import evaluation_batches
from ddp_kit.distributed.collectives import max_over_ranks
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DataError, DdpKitError
from ddp_kit.setup.build import build, build_model
from ddp_kit.setup.memory_format import placement_of
from ddp_kit.training.evaluation import evaluate
from ddp_kit.training.evaluation_sets import data_sets
from ddp_kit.training.recipe_evaluation import Evaluator


def numbered(count: int) -> TensorDataset:
    """Returns samples that are their own index."""
    return TensorDataset(torch.arange(count))


def evaluator(group: Group, made: Recipe, settings: Settings) -> tuple[nn.Module, Evaluator]:
    """Returns a model on its initial weights and its evaluator, without training's parts."""
    model = build_model(made, settings, group)
    assert made.eval_data is not None
    return model, Evaluator(
        recipe=made,
        settings=settings,
        group=group,
        sets=data_sets(made.eval_data(), what="evaluation"),
        micro_batch=int(settings.micro_batch) or settings.global_batch,
        placement=placement_of(model, settings, group),
    )


@pytest.mark.ranks(1, 2, 3, 4)
def test_each_sample_counts_once_and_all_ranks_run_the_same_number_of_forward_passes(
    group: Group,
) -> None:
    sizes = {0, 1, group.world_size - 1, group.world_size, 17}
    for size in sizes:
        for micro_batch in (1, 4, 24):
            passes = 0
            counted = []

            def measure(model: Any, batch: Any) -> dict[str, Any]:
                nonlocal passes
                passes += 1
                return {"index": batch[0], "sum": (batch[0].sum(), len(batch[0]))}

            def summarize(
                means: dict[str, float], rows: dict[str, torch.Tensor]
            ) -> dict[str, float]:
                counted.extend(rows["index"].tolist() if rows else [])  # noqa: B023  # called at once
                return {}

            batches = evaluation_batches(numbered(size), group=group, micro_batch=micro_batch)
            found = evaluate(
                nn.Linear(1, 1), batches, group=group, measure=measure, summarize=summarize
            )
            assert counted == list(range(size))
            assert found == ({"sum": pytest.approx((size - 1) / 2)} if size else {})
            assert max_over_ranks(group, [passes, -passes]) == [passes, -passes]


@pytest.mark.ranks(1, 2, 3)
def test_means_are_over_counts_not_means_of_means(group: Group) -> None:
    """17 samples in micro-batches of 4 and one of 1; a metric that counts a few of them only."""

    def measure(model: nn.Module, batch: Any) -> Mapping[str, Any]:
        inputs, labels = batch
        right = model(inputs).argmax(1) == labels
        return classify(model, batch).sums() | {
            "right_of_3": ((right & (labels == 3)).sum(), (labels == 3).sum())
        }

    settings = Settings(micro_batch=4)
    model, evaluation = evaluator(
        group,
        recipe(settings, model=normed, evaluate=measure, eval_data=lambda: vectors(17)),
        settings,
    )
    found = evaluation(model)
    inputs, labels = vectors(17).tensors
    model.eval()
    logits = model(inputs.double())
    right = (logits.argmax(1) == labels).double()
    assert found["loss"] == pytest.approx(cross_entropy(logits, labels).item(), abs=1e-12)
    assert found["accuracy"] == pytest.approx(right.mean().item(), abs=1e-12)
    assert found["right_of_3"] == pytest.approx(right[labels == 3].mean().item(), abs=1e-12)


def probabilities(model: nn.Module, batch: Any) -> Mapping[str, Any]:
    inputs, labels = batch
    logits = model(inputs)
    sums = {"loss": (cross_entropy(logits, labels, reduction="sum"), len(labels))}
    return sums | {"scores": logits.softmax(1)[:, 1], "labels": labels == 1}


def area(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the area under the ROC curve by its definition: how often a positive sample scores above a negative one."""
    above = scores[labels][:, None] - scores[~labels][None, :]
    return float(((above > 0).double() + 0.5 * (above == 0).double()).mean())


@pytest.mark.ranks(1, 2, 3, 4)
def test_a_metric_of_all_rows_is_that_of_one_process(group: Group) -> None:
    def summarize(means: dict[str, float], rows: dict[str, torch.Tensor]) -> dict[str, float]:
        assert torch.equal(rows["labels"], vectors(37).tensors[1] == 1)  # in sample order
        return {"auroc": area(rows["scores"], rows["labels"]), "doubled": 2 * means["loss"]}

    settings = Settings(micro_batch=4)
    made = recipe(
        settings, evaluate=probabilities, summarize=summarize, eval_data=lambda: vectors(37)
    )
    model, evaluation = evaluator(group, made, settings)
    found = evaluation(model)
    inputs, labels = vectors(37).tensors
    assert found["auroc"] == pytest.approx(
        area(model(inputs.double()).softmax(1)[:, 1], labels == 1), abs=1e-12
    )
    assert found["doubled"] == 2 * found["loss"]


@pytest.mark.slow  # importing torchmetrics takes ten seconds
@pytest.mark.ranks(2)
def test_torchmetrics_functions_fit_into_summarize(group: Group) -> None:
    from torchmetrics.classification import BinaryAUROC
    from torchmetrics.functional.classification import binary_auroc

    def summarize(means: dict[str, float], rows: dict[str, torch.Tensor]) -> dict[str, float]:
        return {"auroc": binary_auroc(rows["scores"], rows["labels"].long()).item()}

    settings = Settings(micro_batch=4)
    made = recipe(
        settings, evaluate=probabilities, summarize=summarize, eval_data=lambda: vectors(37)
    )
    model, evaluation = evaluator(group, made, settings)
    inputs, labels = vectors(37).tensors
    reference = BinaryAUROC()
    reference.update(model(inputs.double()).softmax(1)[:, 1].detach(), (labels == 1).long())
    assert evaluation(model)["auroc"] == pytest.approx(reference.compute().item(), abs=1e-12)


@pytest.mark.ranks(2)
def test_several_sets_are_reported_by_name(group: Group) -> None:
    settings = Settings(micro_batch=4)
    sets = {"near": vectors(17), "far": Data(vectors(30))}
    model, evaluation = evaluator(group, recipe(settings, eval_data=lambda: sets), settings)
    found = evaluation(model)
    assert sorted(found) == ["far/accuracy", "far/loss", "near/accuracy", "near/loss"]
    for name, data in sets.items():
        alone = evaluator(group, recipe(settings, eval_data=lambda data=data: data), settings)[1](
            model
        )
        assert {metric: found[f"{name}/{metric}"] for metric in alone} == alone
    with pytest.raises(DataError, match="the evaluation data far is empty"):
        data_sets({"near": vectors(17), "far": vectors(0)}, what="evaluation")


@pytest.mark.ranks(2)
def test_an_evaluation_changes_neither_model_nor_modes_nor_generators(group: Group) -> None:
    settings = Settings(micro_batch=4)
    model, evaluation = evaluator(
        group, recipe(settings, model=normed, eval_data=lambda: vectors(17)), settings
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert evaluation(model) == evaluation(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())


@pytest.mark.ranks(2)
def test_metrics_or_rows_named_differently_on_the_ranks_are_an_error_on_all(group: Group) -> None:
    def sums(model: Any, batch: Any) -> dict[str, Any]:
        return {f"loss{group.rank}": (1.0, 1)}

    def rows(model: Any, batch: Any) -> dict[str, Any]:
        return {f"row{group.rank}": batch[1]}

    def more(model: Any, batch: Any) -> dict[str, Any]:
        return {f"row{i}": batch[1] for i in range(group.rank + 1)}

    def whole(model: Any, batch: Any) -> dict[str, Any]:
        return {"mean": batch[1].double().mean()}

    messages = {
        sums: "different metrics; rank . has loss",
        rows: "under different names; rank . has row",
        more: "under different names",
    }
    for measure, message in (
        messages | {whole: r"rows of 'mean' have shape \(\) for 4 samples; expected one row each"}
    ).items():
        settings = Settings(micro_batch=4)
        model, evaluation = evaluator(
            group, recipe(settings, evaluate=measure, eval_data=lambda: vectors(8)), settings
        )
        with pytest.raises(DdpKitError, match=message):
            evaluation(model)


@pytest.mark.ranks(3)
def test_rows_come_in_sample_order_whatever_their_dtype_and_shape(group: Group) -> None:
    collected: dict[str, torch.Tensor] = {}

    def measure(model: Any, batch: Any) -> dict[str, Any]:
        own = batch[0].double()
        return {
            "matrix": own[:, None, None].expand(-1, 2, 3).half(),
            "flag": own > 8,
            "index": batch[0],
        }

    def summarize(means: dict[str, float], rows: dict[str, torch.Tensor]) -> dict[str, float]:
        collected.update(rows)
        return {}

    settings = Settings(micro_batch=4)
    made = recipe(settings, evaluate=measure, summarize=summarize, eval_data=lambda: numbered(17))
    model, evaluation = evaluator(group, made, settings)
    assert evaluation(model) == {}
    assert collected["index"].tolist() == list(range(17))
    assert collected["flag"].tolist() == [index > 8 for index in range(17)]
    assert collected["matrix"].shape == (17, 2, 3)
    assert collected["matrix"][:, 1, 2].tolist() == list(range(17))


def drawing(settings: Settings) -> Recipe:
    """Draws samples from the model at every evaluation: all ranks take part."""

    def samples(model: nn.Module) -> dict[str, Any]:
        assert not model.training
        assert not torch.is_grad_enabled()
        model.calls += 1  # type: ignore[operator]  # a plain attribute
        return {"text": f"call {model.calls}", "image": torch.rand(1, 2, 2)}

    def model() -> nn.Module:
        built = plain()
        built.calls = 0  # type: ignore[assignment]  # as above
        return built

    return recipe(settings, model=model, samples=samples, eval_data=lambda: vectors(10))


def test_samples_are_drawn_on_all_ranks_and_delivered_on_rank_0() -> None:
    settings = Settings(max_steps=4, eval_every=2)
    ends = lives(drawing, settings, world_size=2)
    found = [(name, step) for name, _, step in ends[0].samples]
    assert found == [("text", 2), ("image", 2), ("text", 4), ("image", 4)]
    assert ends[0].samples[2][1] == "call 2"
    assert torch.equal(
        ends[0].samples[1][1], ends[0].samples[3][1]
    )  # each evaluation has the same draws
    assert ends[1].samples == []


@pytest.mark.ranks(2)
def test_one_evaluation_micro_batch_runs_before_training(group: Group) -> None:
    def broken(model: Any, batch: Any) -> dict[str, Any]:
        raise ZeroDivisionError("in evaluate")

    with pytest.raises(ZeroDivisionError, match="in evaluate"):
        build(recipe(Settings(), evaluate=broken, eval_data=lambda: vectors(10)), Settings(), group)


@pytest.mark.ranks(2)
def test_several_objectives_are_evaluated_under_their_names(group: Group) -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({"one": nn.Linear(6, 4), "two": nn.Linear(6, 4)})

    def objective(name: str) -> Objective:
        return Objective(
            loss=lambda both, batch: classify(both[name], batch),
            optimizer=lambda part: torch.optim.SGD(part.parameters()),
            trains=name,
        )

    settings = Settings(micro_batch=4)
    made = Recipe(
        model=model,
        objectives=[objective("one"), objective("two")],
        train_data=lambda: vectors(),
        eval_data=lambda: vectors(17),
    )
    built, evaluation = evaluator(group, made, settings)
    found = evaluation(built)
    assert sorted(found) == ["one/accuracy", "one/loss", "two/accuracy", "two/loss"]
    inputs, labels = vectors(17).tensors
    assert found["two/loss"] == pytest.approx(
        cross_entropy(built["two"](inputs.double()), labels).item(), abs=1e-12
    )


@pytest.mark.ranks(2)
def test_an_evaluation_of_rows_alone_has_the_metrics_of_summarize_from_the_start(
    group: Group,
) -> None:
    settings = Settings(micro_batch=4)

    def evaluated(summary: dict[str, float]) -> Evaluator:
        made = recipe(
            settings,
            evaluate=lambda model, batch: {"row": batch[1]},
            summarize=lambda means, rows: summary,
            eval_data=lambda: vectors(9),
        )
        model, evaluation = evaluator(group, made, settings)
        evaluation.dry_run(model)
        return evaluation

    assert set(evaluated({"distance": 1.0}).names) == {"distance"}
    with pytest.raises(DdpKitError, match="counted nothing"):
        evaluated({})
