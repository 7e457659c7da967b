"""A full disk in the main thread's own files: lines wait in memory, and training goes on."""

import json
import resource
from pathlib import Path

import pytest
import torch
from cases import Settings, classify, plain, recipe, vectors
from launching import train
from small_runs import MORTAL, SMALL
from stored import write

import ddp_kit
from ddp_kit.checkpoint.best_weights import best_weights
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.retention import Keep
from ddp_kit.checkpoint.state_dict import model_tensors
from ddp_kit.distributed.collectives import from_rank
from ddp_kit.distributed.process_group import Group
from ddp_kit.io.json_lines import read_lines
from ddp_kit.lifecycle.run_dir import RunDir
from ddp_kit.testing import run_ranks
from ddp_kit.trackers.base import RunInfo
from ddp_kit.trackers.jsonl import JsonlTracker


def grown(folder: Path) -> None:
    """Logs while the system lets no file grow, and afterwards."""
    tracker = JsonlTracker()
    tracker.start(RunInfo(run_dir=folder, name="x"))
    tracker.log({"kind": "eval", "step": 1})
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, ((folder / "metrics.jsonl").stat().st_size + 10, most)
    )  # the next line is torn
    for step in (2, 3):
        tracker.log({"kind": "eval", "step": step})
    tracker.event({"event": "save", "step": 3})
    torn = (folder / "metrics.jsonl").read_text().splitlines()
    assert (len(torn), len(torn[1])) == (2, 10)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    tracker.log({"kind": "eval", "step": 4})
    tracker.finish({})


def test_lines_that_a_full_disk_refused_are_written_once_there_is_room(tmp_path: Path) -> None:
    run_ranks(grown, 1, tmp_path, group=False)
    assert [
        json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2, 3, 4]
    assert [event["step"] for event in read_lines(tmp_path / "events.jsonl")] == [3]


def test_a_run_whose_events_find_no_room_trains_to_its_end_and_says_so_once(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "events.jsonl").symlink_to("/dev/full")
    ended = train(*SMALL, folder=tmp_path, recipe=MORTAL)
    assert ended.codes == [0, 0], ended.errors
    assert ended.status["status"] == "finished"
    assert (
        ended.outputs[0].count("events.jsonl: No space left on device; its lines wait in memory")
        == 1
    )
    assert "events.jsonl: the last 6 lines could not be written" in ended.outputs[0]


def test_a_failure_is_told_even_if_status_json_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: RunDir, content: object) -> None:
        raise OSError(28, "No space left on device", "status.json")

    class Failing:
        def on_start(self, model: object) -> None:
            monkeypatch.setattr(RunDir, "leave_status", full)
            raise RuntimeError("the observer's own")

    settings = Settings(max_steps=2, run_dir=str(tmp_path / "run"))
    with pytest.raises(RuntimeError, match="the observer's own"):
        ddp_kit.run(recipe(settings, callbacks=[Failing()]), settings)
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert "status.json could not be written: [Errno 28] No space left on device" in log
    assert [event["event"] for event in read_lines(tmp_path / "run" / "events.jsonl")][
        -1
    ] == "failure"


@pytest.mark.ranks(2)
def test_a_best_checkpoint_that_is_damaged_gives_way_to_the_next_best(
    group: Group, tmp_path: Path
) -> None:
    model, disk = plain(), LocalDisk(tmp_path)
    feed = ddp_kit.build_loader(vectors(), group=group, global_batch=8)
    training = ddp_kit.wrap(
        model, torch.optim.SGD(model.parameters(), lr=0.1), classify, group=group, feed=feed
    )
    if group.rank == 0:
        for step, loss in ((2, 0.5), (4, 0.1), (6, 0.3)):
            tensors = {name: tensor + step for name, tensor in model_tensors(model).items()}
            write(disk, step, tensors=tensors, metrics={"loss": loss}, best_by="min loss")
        shard = tmp_path / "step-00000004" / "rank-0.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    from_rank(group, b"written")
    first = next(model.parameters()).detach()
    value = float(first.flatten()[0])
    with best_weights(training, disk, keep=Keep(metric="loss")) as step:
        assert (step, float(first.flatten()[0])) == (6, pytest.approx(value + 6))
    assert float(first.flatten()[0]) == value
