"""Starts that come twice: a requeued command, two runs in one process, a look into a live run's folder, a life that only evaluates."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, classify, plain, recipe, vectors
from lives import live
from paths import ROOT
from torch.utils.data import IterableDataset

import ddp_kit
from ddp_kit import Data, run
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.retention import steps
from ddp_kit.distributed import control_packet
from ddp_kit.distributed.collectives import max_over_ranks
from ddp_kit.errors import ConfigError
from ddp_kit.io.polling import wait_until
from ddp_kit.testing import run_ranks, start_ranks

SETTINGS = Settings(max_steps=9, precision="fp32", lr=0.02)


# A stream with a state of its own


class Counted(IterableDataset[Any]):
    """Knows alone how far it was read, and in which order: each life begins with another one."""

    def __init__(self, stride: int):
        self.read, self.stride = 0, stride
        self.data = vectors()

    def __iter__(self) -> Iterator[Any]:
        while self.read < len(self.data):
            self.read += 1
            yield self.data[(self.read * self.stride) % len(self.data)]
        self.read = 0

    def __len__(self) -> int:
        return len(self.data)

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read, "stride": self.stride}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read, self.stride = state["read"], state["stride"]


class Signals:
    """Sends this process a signal after a step, or once an evaluation was saved."""

    def __init__(self, folder: Path, term_at: int, kills: bool):
        self.manifest = folder / "checkpoints" / "step-00000005" / "manifest.json"
        self.term_at, self.kills = term_at, kills

    def on_start(self, model: Any) -> None:
        pass

    def on_step(self, step: int) -> None:
        if step == self.term_at and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)

    def on_evaluation(self, step: int, metrics: Any) -> None:
        self.evaluated = True

    def on_end(self, reason: str) -> None:
        pass


class DiesFirst(Counted):
    """Kills the process at training's first batch, once the evaluation that was owed is saved."""

    def __init__(self, signals: Signals):
        super().__init__(11)
        self.signals = signals

    def __iter__(self) -> Iterator[Any]:
        if getattr(self.signals, "evaluated", False):
            assert wait_until(self._is_saved, within_s=30, pause_s=0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__iter__()

    def _is_saved(self) -> bool:
        return bool(json.loads(self.signals.manifest.read_text())["metrics"])


def streaming(settings: Settings, way: str, stride: int = 7) -> tuple[str, list[float]]:
    """Returns how it ended, and the losses of its steps."""
    control_packet.INTERVAL_S = 0.0
    signals = Signals(Path(settings.run_dir), 4 if way == "owes" else -1, way == "dies")
    data = DiesFirst(signals) if way == "dies" else Counted(stride)
    losses: list[float] = []

    class Losses:
        def start(self, info: Any) -> None:
            pass

        def log(self, record: Any) -> None:
            if record["kind"] == "train":
                losses.append(record["loss"])

        def event(self, event: Any) -> None:
            pass

        def finish(self, status: Any) -> None:
            pass

    made = recipe(
        settings,
        train_data=lambda: Data(data),
        eval_data=lambda: vectors(24),
        callbacks=[signals],
        trackers=[Losses()],
    )
    return run(made, settings).reason, losses


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stream_keeps_its_place_through_a_life_that_only_evaluates(
    world_size: int, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, eval_every=5, log_every=1, run_dir=str(tmp_path / "cut"))
    whole = replace(settings, run_dir=str(tmp_path / "whole"))
    (_, expected), *_ = run_ranks(streaming, world_size, whole, "", group=False)
    (reason, first), *_ = run_ranks(streaming, world_size, settings, "owes", group=False)
    assert "SIGTERM" in reason
    assert len(first) == 5
    with start_ranks(streaming, world_size, settings, "dies", group=False, deadline_s=60) as ranks:
        assert -signal.SIGKILL in [report.exit_code for report in ranks.wait()]
    (_, last), *_ = run_ranks(streaming, world_size, settings, "", 13, group=False)
    assert [*first, *last] == expected


# A command that is typed again


def other_run(folder: Path, **more: Any) -> Settings:
    first = replace(SETTINGS, epochs=2, max_steps=4, save_every=2, run_dir=str(folder / "a"))
    live(recipe, first)
    return replace(first, resume=str(folder / "a"), run_dir=str(folder / "b"), **more)


def typed_again(folder: Path) -> list[int]:
    second = replace(other_run(folder), max_steps=7)
    live(recipe, second)
    rank = int(os.environ.get("RANK", "0"))
    # Another job, and the other run is away by now.
    third = replace(second, max_steps=9)
    if rank == 0:
        shutil.rmtree(folder / "a")
    return [live(recipe, third).step, live(recipe, third).step]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_command_that_goes_on_from_another_run_may_be_typed_again(
    world_size: int, tmp_path: Path
) -> None:
    whole = live(recipe, replace(SETTINGS, epochs=2, run_dir=str(tmp_path / "whole")))
    assert run_ranks(typed_again, world_size, tmp_path, group=False)[0] == [9, 9]
    events = map(json.loads, (tmp_path / "b" / "events.jsonl").read_text().splitlines())
    assert [event["step"] for event in events if event["event"] == "resume"] == [4, 7]
    found = live(recipe, replace(SETTINGS, epochs=2, run_dir=str(tmp_path / "b")))
    if world_size == 1:
        assert all(torch.equal(found.state[n], tensor) for n, tensor in whole.state.items())


def test_a_plain_start_in_between_does_not_make_the_command_another_one(tmp_path: Path) -> None:
    second = replace(other_run(tmp_path), max_steps=5)
    live(recipe, second)
    live(recipe, replace(second, resume="auto", max_steps=7))
    assert live(recipe, replace(second, max_steps=9)).step == 9
    events = map(json.loads, (tmp_path / "b" / "events.jsonl").read_text().splitlines())
    assert [event["step"] for event in events if event["event"] == "resume"] == [4, 5, 7]


def test_a_run_directory_that_began_elsewhere_is_not_taken_for_this_command(
    tmp_path: Path,
) -> None:
    second = other_run(tmp_path)
    live(recipe, replace(second, resume="auto"))
    with pytest.raises(ConfigError, match="has checkpoints of its own"):
        live(recipe, second)


@pytest.mark.parametrize("restarts", ["", "1"])
def test_going_back_in_a_run_is_done_again_by_hand_and_not_by_a_job_that_is_restarted(
    restarts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = replace(SETTINGS, epochs=2, save_every=2, max_steps=6, run_dir=str(tmp_path / "a"))
    live(recipe, first)
    back = replace(first, resume=str(tmp_path / "a" / "checkpoints" / "step-00000002"))
    live(recipe, back)
    if restarts:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    live(recipe, replace(back, max_steps=8))
    events = map(json.loads, (tmp_path / "a" / "events.jsonl").read_text().splitlines())
    begun = [event["step"] for event in events if event["event"] == "resume"]
    assert begun == [2, 6 if restarts else 2]


# Two runs in one process


def folds(folder: Path) -> list[str]:
    """Trains twice, is refused, and trains once more, as cross-validation and fine-tuning do."""
    hashes = []
    for fold in ("one", "two", "bad", "three"):
        settings = replace(SETTINGS, max_steps=2, run_dir=str(folder / fold))
        if fold == "bad":
            with pytest.raises(ConfigError, match="nothing to train"):
                live(lambda own: recipe(own, model=lambda: plain().requires_grad_(False)), settings)
            continue
        outcome = run(recipe(settings), settings)
        hashes.append(outcome.weights_sha256)
    return hashes


@pytest.mark.parametrize("world_size", [1, 2])
def test_runs_follow_one_another_in_the_same_processes(world_size: int, tmp_path: Path) -> None:
    (hashes, *others) = run_ranks(folds, world_size, tmp_path, group=False)
    assert len(set(hashes)) == 1
    assert all(other == hashes for other in others)


SCRIPT = """
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, os.environ["KIT"])
import cases
import ddp_kit
from ddp_kit.errors import ConfigError

folder = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Settings(cases.Settings):
    max_steps: int = 2
    run_dir: str = str(folder / "tuned")
    init_from: str = str(folder / "pre-trained")


recipe = cases.recipe
own = Settings(run_dir=str(folder / "pre-trained"), init_from="")
ddp_kit.run(recipe(own), own)
try:
    refused = replace(own, device="cuda", run_dir=str(folder / "refused"))
    ddp_kit.run(recipe(refused), refused)
    raise AssertionError
except ConfigError:
    pass
if sys.argv[0] == __file__:
    ddp_kit.run(recipe(Settings()), Settings())
"""


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("launcher", ["torchrun", "ddp-kit run"])
def test_runs_follow_one_another_under_every_launcher(
    launcher: str, world_size: int, tmp_path: Path
) -> None:
    """`ddp-kit run` trains the recipe itself, which pre-trains as it is read."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    start = ["torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    if launcher == "ddp-kit run":
        start = ["ddp_kit.launch.local.run", "--nproc-per-node", str(world_size)]
    ended = subprocess.run(
        [sys.executable, "-m", *start, str(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "KIT": str(ROOT / "tests" / "kit")},
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for fold in ("pre-trained", "tuned"):
        assert json.loads((tmp_path / fold / "status.json").read_text())["status"] == "finished"


def fails_to_start(folder: Path) -> int:
    """Returns the ranks of a group that was entered after a start that failed on one rank."""
    from ddp_kit.distributed import process_group as room

    rank = int(os.environ["RANK"])
    made = room._make_small_groups

    def fails(*args: Any, **more: Any) -> None:
        made(*args, **more)
        raise OSError("no room for a socket")

    room._make_small_groups = fails
    with pytest.raises(OSError, match="no room"), ddp_kit.process_group(device="cpu"):
        pass
    room._make_small_groups = made
    assert not torch.distributed.is_initialized()
    with ddp_kit.process_group(device="cpu") as group:
        return max_over_ranks(group, [rank])[0] + 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_start_that_failed_leaves_room_for_another(world_size: int, tmp_path: Path) -> None:
    assert run_ranks(fails_to_start, world_size, tmp_path, group=False) == [world_size] * world_size


def meets_by_a_file(folder: Path, world_size: int) -> int:
    own = {"init_method": f"file://{folder}/meeting", "device": "cpu"}
    for _ in range(2):
        with ddp_kit.process_group(**own) as group:
            max_over_ranks(group, [group.rank])
    with ddp_kit.process_group(**own) as group:
        return max_over_ranks(group, [group.rank])[0] + 1


def test_an_address_of_ones_own_may_be_met_at_again(tmp_path: Path) -> None:
    assert run_ranks(meets_by_a_file, 2, tmp_path, 2, group=False) == [2, 2]


# A live run's folder


def looks_in(folder: Path) -> int:
    with ddp_kit.process_group(device="cpu") as group:
        return ddp_kit.restore(own_training(group), folder)


def own_training(group: Any) -> Any:
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    feed = ddp_kit.build_loader(vectors(), group=group, global_batch=8)
    return ddp_kit.wrap(model, optimizer, classify, group=group, feed=feed)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_restoring_from_a_live_runs_folder_changes_nothing_in_it(tmp_path: Path) -> None:
    with ddp_kit.process_group(device="cpu") as group:
        training = own_training(group)
        for number in (1, 2):
            training.step = number
            ddp_kit.save(training, tmp_path)
    # In flight; half deleted; and one that is just being deleted: it has lost a file already.
    for name in ("step-00000003.tmp-0123456789ab", "step-00000001.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-0.safetensors").write_bytes(b"...")
    shutil.copytree(tmp_path / "step-00000002", tmp_path / "step-00000004")
    (tmp_path / "step-00000004" / "state.json").unlink()
    before = content(tmp_path)
    assert looks_in(tmp_path) == 2
    assert content(tmp_path) == before


def test_the_first_save_takes_the_folder_over(tmp_path: Path) -> None:
    test_restoring_from_a_live_runs_folder_changes_nothing_in_it(tmp_path)
    with ddp_kit.process_group(device="cpu") as group:
        training = own_training(group)
        ddp_kit.restore(training, tmp_path)
        training.step = 3
        ddp_kit.save(training, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "step-00000001",
        "step-00000002",
        "step-00000003",
        "step-00000004.superseded",
    ]
    assert steps(LocalDisk(tmp_path)) == [3, 2, 1]
