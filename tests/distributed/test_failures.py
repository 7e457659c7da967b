"""One rank fails, and every rank ends: within seconds, with the culprit's words first and once, and nothing left half-written."""

import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, classify, normed, plain, recipe
from launching import Ended, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from ddp_kit import Data, LossSum
from ddp_kit.checkpoint.weights import weights_sha256
from ddp_kit.data.batch_plan import plan_batches
from ddp_kit.data.loader import feed_of
from ddp_kit.data.rank_batch import RankBatch
from ddp_kit.data.transfer import Placement
from ddp_kit.distributed.process_group import process_group
from ddp_kit.errors import NonFiniteError
from ddp_kit.strategies.ddp import _release
from ddp_kit.testing import run_ranks, start_ranks
from ddp_kit.train import run

HOST = socket.gethostname()
SLOW = [pytest.mark.slow, pytest.mark.steady]
OWN_FAULTS = {
    "recipe": "ValueError: the recipe's own fault",
    "loss": "ValueError: the loss's own fault",
    "callback": "ValueError: the callback's own fault",
    "evaluation": "ValueError: the evaluation's own fault",
    "worker": "ValueError: the worker's own fault",
}


def follows(ended: Ended, *, culprit: int, message: str) -> bool:
    """Whether each rank but the culprit said one line, after the culprit's own words."""
    lines = [
        line for line in ended.errors.splitlines() if not line.startswith("to go on from step ")
    ]
    followers = [rank for rank in range(len(ended.codes)) if rank != culprit]
    expected = {
        f"rank {rank} on {HOST}: ended because rank {culprit} failed: {message}"
        for rank in followers
    }
    return set(lines[-len(followers) :]) == expected


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("fault", OWN_FAULTS)
def test_an_exception_on_one_rank_ends_all(fault: str, culprit: int, tmp_path: Path) -> None:
    flags = ["--num-workers", "1"] if fault == "worker" else ["--eval-every", "2"]
    step = "--at-step=4" if fault == "evaluation" else "--at-step=3"
    ended = train("--fault", fault, "--at-rank", str(culprit), step, *flags, folder=tmp_path)
    assert ended.codes == [1, 1]
    assert ended.errors.startswith(
        f"rank {culprit} on {HOST} failed:\nTraceback (most recent call last):\n"
    )
    assert (
        ended.errors.count(OWN_FAULTS[fault]) == 2
    )  # at the end of the traceback, and in the follower's line
    where = " (in a loader worker)" if fault == "worker" else ""
    assert follows(ended, culprit=culprit, message=OWN_FAULTS[fault] + where)
    assert ended.is_clean()
    if fault != "recipe":  # there rank 0 may have had the time to open its directory, or not
        assert ended.status["status"] == "failed"
        assert ended.status["reason"] == f"rank {culprit}: {OWN_FAULTS[fault]}{where}"
        assert ended.status["exit_code"] == 1
        assert ended.status["step"] == {"loss": 3, "callback": 3, "evaluation": 4}.get(
            fault, ended.status["step"]
        )


def test_a_loss_that_fails_names_step_and_samples(tmp_path: Path) -> None:
    ended = train("--fault", "loss", "--at-rank", "1", folder=tmp_path)
    assert "in the forward pass of step 4, micro-batch 1, samples " in ended.errors


@pytest.mark.parametrize("culprit", [pytest.param(0, marks=SLOW), pytest.param(1, marks=SLOW), 3])
def test_four_ranks_end_as_two_do(culprit: int, tmp_path: Path) -> None:
    ended = train(
        "--fault", "callback", "--at-rank", str(culprit), folder=tmp_path, world_size=4, limit_s=20
    )
    assert ended.codes == [1] * 4
    assert follows(ended, culprit=culprit, message=OWN_FAULTS["callback"])
    assert ended.is_clean()


@pytest.mark.parametrize(
    ("killed", "world_size"), [(0, 2), (1, 2), pytest.param(0, 4, marks=SLOW), (2, 4)]
)
def test_a_killed_rank_ends_the_others_who_say_that_a_peer_is_gone(
    killed: int, world_size: int, tmp_path: Path
) -> None:
    ended = train(
        "--fault",
        "SIGKILL",
        "--at-rank",
        str(killed),
        folder=tmp_path,
        world_size=world_size,
        limit_s=20,
    )
    assert ended.codes == [-signal.SIGKILL if rank == killed else 1 for rank in range(world_size)]
    gone = "a peer is gone that left no word (killed, or out of memory)"
    lines = ended.errors.splitlines()
    assert sorted(line.split(";")[0] for line in lines) == [
        f"rank {rank} on {HOST}: {gone}" for rank in range(world_size) if rank != killed
    ]
    assert any(f"; not heard of: rank {killed}" in line for line in lines)
    assert ended.is_clean()  # if rank 0 is the one that died, another one has written this
    assert ended.status["status"] == "failed"
    assert ended.status["reason"].startswith(gone)
    assert ended.status["step"] == 3


@pytest.mark.parametrize(
    ("name", "culprit", "code", "status"),
    [
        ("SIGTERM", 0, 143, "preempted"),
        ("SIGTERM", 1, 143, "preempted"),
        ("SIGINT", 1, 130, "stopped"),
        ("SIGUSR1", 1, 143, "preempted"),
    ],
)
def test_a_signal_on_one_rank_stops_all_at_the_same_step(
    name: str, culprit: int, code: int, status: str, tmp_path: Path
) -> None:
    ended = train(
        "--fault",
        name,
        "--at-rank",
        str(culprit),
        "--max-steps",
        "1000",
        "--log-every",
        "500",
        folder=tmp_path,
    )
    assert ended.codes == [code, code]
    assert ended.errors == ""
    step = ended.status["step"]
    assert 3 < step < 1000
    assert all(
        f"ended after step {step}: {name} on rank {culprit}\n" in output for output in ended.outputs
    )
    assert (ended.status["status"], ended.status["exit_code"], ended.status["reason"]) == (
        status,
        code,
        f"{name} on rank {culprit}",
    )
    assert bool(ended.status["weights_sha256"]) == (
        status == "stopped"
    )  # a grace period is for saving
    assert ended.is_clean()


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    ended = train("--fault", "SIGINT SIGTERM", "--at-rank", "1", folder=tmp_path)
    assert ended.codes == [1, -signal.SIGTERM]
    assert ended.errors.startswith(f"rank 0 on {HOST}: a peer is gone that left no word")
    assert ended.status["status"] == "failed"
    assert ended.is_clean()


@pytest.mark.parametrize(
    ("name", "code", "status"), [("SIGTERM", 143, "preempted"), ("SIGINT", 130, "stopped")]
)
def test_before_the_first_step_a_signal_ends_the_run_at_once(
    name: str, code: int, status: str, tmp_path: Path
) -> None:
    ended = train("--fault", name, "--at-rank", "0", "--at-step", "0", folder=tmp_path)
    assert ended.codes == [code, 1]
    assert ended.errors.startswith(f"rank 0 on {HOST}: Stopped: {name} before the first step\n")
    assert follows(ended, culprit=0, message=f"Stopped: {name} before the first step")
    assert (ended.status["status"], ended.status["exit_code"], ended.status["step"]) == (
        status,
        code,
        0,
    )
    assert ended.is_clean()


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_loss_that_is_not_finite_on_one_rank_ends_all_at_the_same_step(
    culprit: int, tmp_path: Path
) -> None:
    ended = train("--fault", "nan", "--at-rank", str(culprit), folder=tmp_path)
    assert ended.codes == [1, 1]
    assert ended.errors.startswith(f"the loss of step 4 is not finite on rank {culprit}, samples ")
    assert ended.errors.count("\n") == 1  # both ranks know it, one says it
    assert (ended.status["status"], ended.status["step"]) == ("failed", 3)
    assert f"step 4 is not finite on rank {culprit}" in ended.status["reason"]
    assert ended.is_clean()


@pytest.mark.parametrize("culprit", [0, 1, -1])
def test_a_parameter_that_only_a_later_step_leaves_out_ends_all_at_that_step(
    culprit: int, tmp_path: Path
) -> None:
    """DDP itself would end the run one step late, the bad step applied, or never on the ranks that used it."""
    ended = train("--fault", "unused later", "--at-rank", str(culprit), folder=tmp_path)
    assert ended.codes == [1, 1]
    message = "idle.weight, idle.bias got no gradient, "
    assert ended.errors.startswith(message)
    assert "--find-unused-parameters" in ended.errors.splitlines()[0]
    assert ended.errors.count(message) == (
        2 if culprit >= 0 else 1
    )  # once more by the one that follows; both fail alike with -1
    assert (ended.status["status"], ended.status["step"]) == ("failed", 3)
    assert ended.is_clean()


class Poison:
    """A loss, and the callback by which it knows the step, that is infinite on rank 1 after so many steps; -1: never."""

    def __init__(self, *, after: int) -> None:
        self.after, self.step, self.is_here = after, 0, os.environ["RANK"] == "1"

    def on_start(self, model: nn.Module) -> None: ...

    def on_step(self, step: int) -> None:
        self.step = step

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def on_end(self, reason: str) -> None: ...

    def loss(self, model: nn.Module, batch: Any) -> LossSum:
        result = classify(model, batch)
        return LossSum(
            result.total * (float("inf") if self.is_here and self.step == self.after else 1),
            result.count,
        )


def weights_after(run_dir: str, steps: int, bad_after: int) -> tuple[str, str]:
    """Trains a net with BatchNorm. Returns the hash of the weights that are in memory at the end, and the error's message."""
    poison, settings, models = (
        Poison(after=bad_after),
        Settings(max_steps=steps, run_dir=run_dir),
        [],
    )

    def model() -> nn.Module:
        models.append(normed())
        return models[0]

    message = ""
    try:
        run(recipe(settings, model=model, loss=poison.loss, callbacks=[poison]), settings)
    except NonFiniteError as error:
        message = str(error)
    return weights_sha256(models[0]), message


def test_after_a_loss_that_is_not_finite_the_weights_are_those_before_the_step(
    tmp_path: Path,
) -> None:
    bad = run_ranks(weights_after, 2, str(tmp_path / "bad"), 8, 4, group=False)
    good = run_ranks(weights_after, 2, str(tmp_path / "good"), 4, -1, group=False)
    assert len({digest for digest, _ in [*bad, *good]}) == 1
    assert {message.split(",")[0] for _, message in bad} == {
        "the loss of step 5 is not finite on rank 1"
    }


def of_gloo() -> list[str]:
    """The names of this process's threads that are gloo's, as Linux has them."""
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


def train_and_exit() -> None:
    """A whole life of a rank with a DDP model, ended as an interpreter ends: finalised, with the destructors of C++."""
    with process_group(device="cpu") as group:
        model = DistributedDataParallel(plain(), process_group=group.pg)
        group.closing.callback(_release, model)
        for _ in range(2):
            model(torch.ones(4, 6)).sum().backward()
        assert of_gloo()
    end = time.monotonic() + 10
    while of_gloo() and time.monotonic() < end:
        time.sleep(0.01)
    assert of_gloo() == []
    assert model.module is not None
    sys.stdout.flush()
    ctypes.pythonapi.Py_Exit(ctypes.c_int(0))


def exit_codes(lives: int) -> list[int]:
    codes = []
    for _ in range(lives):
        with start_ranks(train_and_exit, 4, group=False, deadline_s=30) as ranks:
            reports = ranks.wait()
        codes += [report.exit_code for report in reports]
    return codes


def test_four_ranks_exit_0_and_gloo_is_gone_before_though_the_model_is_not() -> None:
    """A group of gloo's that outlives its destruction aborts some processes at their exit, and those seldom."""
    assert exit_codes(1) == [0] * 4


@pytest.mark.slow
@pytest.mark.steady
def test_fifty_normal_endings_of_four_ranks_exit_0() -> None:
    assert exit_codes(50) == [0] * 200


class Numbers(Dataset[Any]):
    """A data set that only a loader worker can read, or not even that."""

    def __init__(self, *, is_readable: bool) -> None:
        self.is_readable = is_readable

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> int:
        if get_worker_info() is None or not self.is_readable:
            raise ValueError
        return index


def batches_of_a_worker(*, is_readable: bool = True) -> Generator[RankBatch, None, None]:
    plan = plan_batches(4, micro_batch=0, world_size=1)
    feed = feed_of(
        Data(Numbers(is_readable=is_readable)),
        plan=plan,
        rank=0,
        seed=0,
        placement=Placement(torch.device("cpu")),
        num_workers=1,
    )
    return feed.batches(start=0, end=16)


def test_a_loader_worker_ends_at_its_parents_word_and_at_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal to the whole job comes from elsewhere, and must not take it before the step is done; nor may it by a thread that the worker
    had before we were asked, as a library may start one."""
    first = signal_handling._set_worker_signal_handlers

    def with_a_thread() -> None:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        first()

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", with_a_thread)
    with closing(batches_of_a_worker()) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        for name in ("-TERM", "-INT", "-HUP", "-USR1"):
            subprocess.run(["kill", name, str(worker.pid)], check=True)
        assert len([next(batches) for _ in range(8)]) == 8
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0


@pytest.mark.parametrize("is_readable", [True, False])
def test_loader_workers_end_with_the_loop_though_a_traceback_holds_it(is_readable: bool) -> None:
    kept: list[BaseException] = []
    try:
        with closing(batches_of_a_worker(is_readable=is_readable)) as batches:
            for _ in batches:
                raise ValueError
    except ValueError as error:
        kept.append(error)
    assert kept
    assert multiprocessing.active_children() == []
