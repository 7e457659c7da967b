"""Siblings of the habits beside: the same kinds in another dress, each against bare torch, one rank or the run that was never stopped."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import Settings, classify, distance, plain, recipe, trace, vectors
from lives import live, lives
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset, Subset

from ddp_kit import Data, LossSum
from ddp_kit.data.seeding import Purpose, key, permutation
from ddp_kit.distributed.process_group import Group, process_group
from ddp_kit.distributed.topology import Topology
from ddp_kit.errors import ConfigError, DataError, DdpKitError
from ddp_kit.setup.build import build
from ddp_kit.testing import RanksError, run_ranks
from ddp_kit.training.step import train_step

# Data


class Handle(Dataset[Any]):
    """One object for all data; its file is opened at the first sample."""

    def __init__(self, path: str):
        self.path = path
        self.file: int | None = None

    def __len__(self) -> int:
        return 120

    def __getitem__(self, index: int) -> Any:
        if self.file is None:
            self.file = os.open(self.path, os.O_RDONLY)
        os.lseek(self.file, 8 * index, os.SEEK_SET)
        torch.randn(20)  # time for another process to seek too
        value = int(np.frombuffer(os.read(self.file, 8), dtype=np.int64)[0])
        assert value == index
        return torch.full((6,), value / 120), value


def shared(path: str) -> tuple[list[int], bool]:
    """Train and evaluation data are parts of one object, and workers are forked in each epoch."""
    whole = Handle(path)
    seen: list[int] = []

    def loss(model: nn.Module, batch: Any) -> LossSum:
        inputs, values = batch
        if model.training:
            seen.extend(values.tolist())
        return classify(model, (inputs, values % 4))

    settings = Settings(run_dir=f"{path}.run", num_workers=2, epochs=2, max_steps=0)
    live(
        lambda own: recipe(
            own,
            loss=loss,
            train_data=lambda: Subset(whole, range(96)),
            eval_data=lambda: Subset(whole, range(96, 120)),
        ),
        settings,
    )
    return seen, whole.file is not None


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_object_for_training_and_evaluation_is_opened_in_workers_only(
    tmp_path: Path, ranks: int
) -> None:
    path = tmp_path / "numbers"
    np.arange(120, dtype=np.int64).tofile(path)
    found = run_ranks(shared, ranks, str(path), group=False)
    assert not any(is_open for _, is_open in found)


def hugging_face(samples: int, *, by_node: tuple[int, int] | None = None) -> Any:
    datasets = pytest.importorskip("datasets")
    inputs, labels = vectors(samples).tensors
    whole = datasets.Dataset.from_dict({"x": inputs.tolist(), "y": labels.tolist()})
    stream = whole.to_iterable_dataset(num_shards=4).with_format("torch")
    if by_node is not None:
        from datasets.distributed import split_dataset_by_node

        stream = split_dataset_by_node(stream, rank=by_node[0], world_size=by_node[1])
    return stream


def on_columns(model: nn.Module, batch: Any) -> LossSum:
    return classify(model, (batch["x"].to(next(model.parameters()).dtype), batch["y"]))


def streamed(num_workers: int) -> list[float]:
    settings = Settings(max_steps=4, num_workers=num_workers, micro_batch=6)
    with process_group(device="cpu") as group:
        made = recipe(settings, loss=on_columns, train_data=lambda: hugging_face(240))
        return trace(group, made, settings).losses


def test_a_hugging_face_stream_is_the_same_on_any_number_of_ranks() -> None:
    reference = run_ranks(streamed, 1, 0, group=False)[0]
    for losses in run_ranks(streamed, 2, 0, group=False):
        assert losses == pytest.approx(reference, abs=1e-9)
    # It has a state_dict, and a place in the stream that only the training process can save.
    with pytest.raises(RanksError, match=r"keeps its own state.*--num-workers 0"):
        run_ranks(streamed, 1, 2, group=False)


@pytest.mark.ranks(2)
def test_one_that_is_split_by_node_is_refused(group: Group) -> None:
    settings = Settings(max_steps=2)
    node = (group.rank, group.world_size)
    made = recipe(settings, loss=on_columns, train_data=lambda: hugging_face(240, by_node=node))
    with pytest.raises(DataError, match="gives rank 1 other samples than rank 0"):
        build(made, settings, group)


ORDERS: dict[str, tuple[Any, str]] = {
    "empty": ([], "Expected are whole numbers|0 |no samples|empty"),
    "negative": ([-1, *range(239)], "Expected are whole numbers|-1"),
    "beyond": ([*range(239), 240], "240"),
    "complex": (np.arange(240).astype(complex), "Expected are whole numbers"),
    "texts": ([str(i) for i in range(240)], "Expected are whole numbers"),
    "two dimensions": (np.arange(240).reshape(2, 120), "Expected are whole numbers"),
}


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("kind", ORDERS)
def test_further_orders_that_are_none_are_refused(group: Group, kind: str) -> None:
    order, said = ORDERS[kind]
    data = Data(vectors(), order=lambda seed, epoch, size: order)
    with pytest.raises((DataError, DdpKitError), match=said):
        build(recipe(Settings(), train_data=lambda: data), Settings(), group)


# Models


class OldSpectral(nn.Module):
    """torch's first spectral_norm: a hook that makes the weight, and a vector that moves in it."""

    def __init__(self) -> None:
        super().__init__()
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.inner = nn.utils.spectral_norm(nn.Linear(6, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(x).tanh())


class Instances(nn.Module):
    """Running statistics of another layer than BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(2, track_running_stats=True, affine=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x.view(-1, 2, 3)).flatten(1))


class Averaged(nn.Module):
    """A teacher by torch's own class, which follows in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(6, 4)
        self.teacher = AveragedModel(self.student, multi_avg_fn=None).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.teacher.update_parameters(self.student)
        return self.student(x) + 0.1 * self.teacher(x)


class Observed(nn.Module):
    """Ranges as quantisation keeps them: buffers that only grow, by minimum and maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.register_buffer("low", torch.tensor(float("inf")))
        self.register_buffer("high", torch.tensor(float("-inf")))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.low.copy_(torch.minimum(self.low, x.detach().min()))
            self.high.copy_(torch.maximum(self.high, x.detach().max()))
        return self.head((x - self.low) / (self.high - self.low))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "old spectral norm": OldSpectral,
    "instance norm": Instances,
    "averaged model": Averaged,
    "observed": Observed,
}


# Its first pass copies what is equal: only what the user says tells that it will change.
WORDS = {"averaged model": {"teacher.module.*": "first"}}


def trained(name: str, settings: Settings) -> Any:
    return recipe(
        settings,
        model=MODELS[name],
        optimizer=lambda m: SGD([p for p in m.parameters() if p.requires_grad], lr=0.1),
        eval_data=lambda: Data(vectors(20)),
        buffers=WORDS.get(name, {}),
    )


def floats(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in state.items()}


@pytest.mark.ranks(1)
@pytest.mark.parametrize("name", MODELS)
def test_one_micro_batch_of_a_sibling_is_bare_torch(group: Group, name: str) -> None:
    settings = Settings(max_steps=5)
    ours = trace(group, trained(name, settings), settings)
    torch.manual_seed(key(settings.seed, Purpose.WEIGHTS))
    net = MODELS[name]().double()
    optimizer = SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    inputs, labels = vectors().tensors
    for step in range(5):
        part = torch.from_numpy(permutation(0, 0, 240)[24 * step : 24 * step + 24])
        optimizer.zero_grad()
        cross_entropy(net(inputs[part].double()), labels[part]).backward()
        optimizer.step()
    assert distance(floats(ours.state), floats(dict(net.state_dict()))) <= 1e-12


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("name", MODELS)
def test_the_ranks_of_a_sibling_give_what_one_gives(group: Group, name: str) -> None:
    settings = Settings(max_steps=5, micro_batch=4)
    ours = trace(group, trained(name, settings), settings)
    with process_group(topology=Topology(), device="cpu") as alone:
        one = trace(alone, trained(name, settings), settings)
    assert distance(floats(ours.state), floats(one.state)) <= 1e-12


@pytest.mark.ranks(1, 2)
def test_a_teacher_that_begins_to_follow_later_is_refused_with_the_word_for_it(
    group: Group,
) -> None:
    settings = Settings(max_steps=5, micro_batch=4)
    said = r"changes the weight teacher\.module\.weight, .*Recipe\(buffers="
    with pytest.raises(DdpKitError, match=said):
        trace(group, replace(trained("averaged model", settings), buffers={}), settings)


# What resumes


class Remembering(Optimizer):
    """Keeps the last gradients of a parameter in a list, and a deque of their norms in the group."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr, "norms": []})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                kept = self.state[parameter].setdefault("past", [])
                kept.append(parameter.grad.clone())
                del kept[:-3]
                scale = 1 / (1 + len(group["norms"]))
                parameter.sub_(sum(kept) * group["lr"] * scale)
            group["norms"] = [*group["norms"], float(parameter.grad.norm())][-2:]


def remembering(settings: Settings) -> Any:
    return recipe(settings, model=plain, optimizer=lambda m: Remembering(m.parameters()))


@pytest.mark.parametrize("ranks", [1, 2])
def test_lists_of_tensors_that_an_optimizer_keeps_come_back(tmp_path: Path, ranks: int) -> None:
    settings = Settings(max_steps=8, save_every=2)
    whole = lives(remembering, settings, world_size=ranks)[0]
    own = replace(settings, run_dir=str(tmp_path / "run"), max_steps=4)
    run_ranks(live, ranks, remembering, own, group=False)
    on = replace(own, max_steps=8, change=("max_steps",))
    resumed = run_ranks(live, ranks, remembering, on, group=False)[0]
    assert resumed.step == 8
    assert distance(resumed.state, whole.state) == 0.0


def half_frozen() -> nn.Module:
    net = plain()
    net[0].requires_grad_(False)
    return net


def adapted(settings: Settings) -> Any:
    return recipe(
        settings,
        model=half_frozen,
        optimizer=lambda m: SGD([p for p in m.parameters() if p.requires_grad], lr=0.1),
    )


@pytest.mark.parametrize("before", [True, False])
def test_which_weights_are_saved_does_not_change_in_a_run(tmp_path: Path, before: bool) -> None:
    settings = Settings(max_steps=2, run_dir=str(tmp_path / "run"), save_trainable_only=before)
    live(adapted, settings)
    on = replace(
        settings,
        max_steps=4,
        save_trainable_only=not before,
        change=("max_steps", "save_trainable_only"),
    )
    with pytest.raises(ConfigError, match="--save-trainable-only cannot change in the course"):
        live(adapted, on)


# What is reported


def odd_evaluate(model: nn.Module, batch: Any) -> dict[str, Any]:
    inputs, labels = batch
    right = model(inputs).argmax(1) == labels
    return {
        "right": right,
        "half": right.half(),
        "pair": (right.sum(), torch.tensor(len(labels))),
        "numpy": (np.float32(right.sum().item()), np.int64(len(labels))),
    }


def summarised(means: dict[str, float], rows: Any) -> dict[str, float]:
    return {
        "pair": means["pair"],
        "numpy": means["numpy"],
        "right": rows["right"].double().mean().item(),
        "half": rows["half"].double().mean().item(),
    }


@pytest.mark.ranks(1, 2, 3)
def test_numbers_of_numpy_and_rows_of_booleans_and_halves_count(group: Group) -> None:
    settings = Settings(micro_batch=4, max_steps=1)
    made = build(
        recipe(
            settings,
            eval_data=lambda: Data(vectors(29)),
            evaluate=odd_evaluate,
            summarize=summarised,
        ),
        settings,
        group,
    )
    for batch in made.feed.batches(start=0, end=1):
        train_step(made.training, batch)
    found = made.evaluator(made.training.model)
    assert len({round(value, 3) for name, value in found.items()}) == 1, found
    made.training.control_packet.close()
