"""Ranks that die in the middle of a save, and disks that fail: nothing is lost but the steps since the last checkpoint."""

import json
import random
import signal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from launching import Ended, train
from lives import alone
from small_runs import MORTAL, SMALL

from ddp_kit.checkpoint.format.reader import open_checkpoint
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.retention import steps

needs_deepspeed = pytest.mark.skipif(
    not find_spec("deepspeed"),
    reason="deepspeed is not installed: pip install 'ddp_kit[deepspeed]'",
)


def run(folder: Path, *args: str, disk: str = "", deaths: str = "", limit_s: float = 30) -> Ended:
    folder.mkdir(exist_ok=True)
    return train(
        *SMALL,
        *args,
        folder=folder,
        recipe=MORTAL,
        env={"DISK": disk, "DEATHS": deaths},
        limit_s=limit_s,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The run that nothing happened to."""
    ended = run(tmp_path_factory.mktemp("whole"))
    assert ended.codes == [0, 0], ended.errors
    assert names(ended) == ["step-00000004", "step-00000008", "step-00000010"]
    return ended


def names(ended: Ended) -> list[str]:
    return sorted(path.name for path in (ended.run_dir / "checkpoints").iterdir())


def events(ended: Ended, kind: str) -> list[dict[str, Any]]:
    return [
        event
        for event in map(json.loads, (ended.run_dir / "events.jsonl").read_text().splitlines())
        if event["event"] == kind
    ]


def all_good(ended: Ended) -> None:
    """Every checkpoint that is there by name is whole."""
    storage = LocalDisk(ended.run_dir / "checkpoints")
    for step in steps(storage):
        open_checkpoint(storage, step, group=alone())


# Operations of the second save, as counted by the disk: a rank opens, writes and syncs its shard (1-3); rank 0 goes on with state.json
# (4-6), manifest.json (7-9), the folder (10, 11), the rename (12), the parent (13, 14); --keep 1 then deletes step 4 (15-23).
LAST = {0: 23, 1: 3}
EVERY_PUSH = {(0, 6), (0, 12), (0, 20), (1, 2)}
POSITIONS = []
for rank in LAST:
    for at in range(1, LAST[rank] + 1):
        marks = [] if (rank, at) in EVERY_PUSH else pytest.mark.slow
        POSITIONS.append(pytest.param(rank, at, marks=marks, id=f"rank {rank} at {at}"))


@pytest.mark.parametrize(("rank", "at"), POSITIONS)
def test_a_rank_killed_at_any_file_operation_of_a_save_costs_no_more_than_steps(
    tmp_path: Path, whole: Ended, rank: int, at: int
) -> None:
    cut = run(tmp_path, "--keep", "1", disk=f"kill {rank} 8 {at}")
    assert cut.codes[rank] == -signal.SIGKILL, cut.errors
    assert "killed before" in cut.outputs[rank]
    all_good(cut)
    assert steps(LocalDisk(cut.run_dir / "checkpoints"))[0] == (4 if rank or at <= 12 else 8)
    ended = run(tmp_path, "--keep", "1")
    assert ended.codes == [0, 0], ended.errors
    assert events(ended, "resume")[-1]["step"] == (4 if rank or at <= 12 else 8)
    assert ended.status["weights_sha256"] == whole.status["weights_sha256"]
    assert names(ended) == ["step-00000010"]
    records = map(json.loads, (ended.run_dir / "metrics.jsonl").read_text().splitlines())
    assert [record["step"] for record in records if record["kind"] == "train"] == list(
        range(1, 11)
    ), "each once, none lost"


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", ["zero1", "fsdp", pytest.param("deepspeed", marks=needs_deepspeed)]
)
def test_so_it_is_with_every_strategy(tmp_path: Path, strategy: str) -> None:
    flags = [
        "--strategy",
        strategy,
        *(["--deepspeed.stage", "3", "--precision", "fp32"] if strategy == "deepspeed" else []),
    ]
    whole = run(tmp_path / "whole", *flags, limit_s=60)
    assert whole.codes == [0, 0], whole.errors
    for rank, at in EVERY_PUSH:
        folder = tmp_path / f"{rank}-{at}"
        cut = run(folder, "--keep", "1", *flags, disk=f"kill {rank} 8 {at}", limit_s=60)
        assert cut.codes[rank] == -signal.SIGKILL, cut.errors
        all_good(cut)
        ended = run(folder, "--keep", "1", *flags, limit_s=60)
        assert ended.codes == [0, 0], ended.errors
        assert events(ended, "resume")[-1]["step"] == (4 if rank or at <= 12 else 8)
        assert ended.status["weights_sha256"] == whole.status["weights_sha256"]


def test_the_positions_are_all_that_there_are(tmp_path: Path) -> None:
    """The last one is there; one further, and there is no operation left at which to die."""
    cut = run(tmp_path / "cut", "--keep", "1", disk=f"kill 0 8 {LAST[0]}")
    assert -signal.SIGKILL in cut.codes, cut.outputs
    ended = run(tmp_path, "--keep", "1", disk=f"kill 0 8 {LAST[0] + 1}, kill 1 8 {LAST[1] + 1}")
    assert ended.codes == [0, 0], ended.outputs


@pytest.mark.slow
def test_five_killed_saves_in_a_row_leave_no_growing_rubbish(tmp_path: Path, whole: Ended) -> None:
    for rank, at in ((0, 2), (1, 1), (0, 8), (0, 12), (0, 11)):
        cut = run(tmp_path, disk=f"kill {rank} 8 {at}")
        assert -signal.SIGKILL in cut.codes
        left = names(cut)
        assert left[0] == "step-00000004"
        assert len(left) <= 2, left
    ended = run(tmp_path)
    assert names(ended) == names(whole)
    assert ended.status["weights_sha256"] == whole.status["weights_sha256"]


def test_a_rank_that_dies_while_its_peers_save_is_in_flight_ends_all_within_10_s(
    tmp_path: Path, whole: Ended
) -> None:
    cut = run(tmp_path, disk="stall 1 4 60", deaths="7:0", limit_s=10)
    assert cut.codes[0] == -signal.SIGKILL
    assert cut.codes[1] == 1
    assert cut.status["status"] == "failed"
    ended = run(tmp_path)
    assert ended.status["weights_sha256"] == whole.status["weights_sha256"]


@pytest.mark.slow
def test_thirty_kills_at_random_steps_change_nothing(tmp_path: Path) -> None:
    args = ["--epochs", "8", "--save-every", "3"]
    whole = run(tmp_path / "whole", *args)
    draw, at = random.Random(3), 0
    for _ in range(30):
        cut = run(tmp_path / "cut", *args, deaths=f"{at + draw.randint(1, 5)}:{draw.randrange(2)}")
        assert -signal.SIGKILL in cut.codes, cut.errors
        at = max(steps(LocalDisk(cut.run_dir / "checkpoints")), default=0)
    assert at > 20
    ended = run(tmp_path / "cut", *args)
    assert ended.codes == [0, 0], ended.errors
    assert ended.status["weights_sha256"] == whole.status["weights_sha256"]


# Disks that fail


@pytest.mark.parametrize(
    ("error", "rank", "operation"),
    [
        ("ENOSPC", 1, "write"),
        ("EIO", 0, "fsync"),
        pytest.param("ENOSPC", 0, "write", marks=pytest.mark.slow),
        pytest.param("EIO", 1, "fsync", marks=pytest.mark.slow),
        pytest.param("EROFS", 0, "open", marks=pytest.mark.slow),
        pytest.param("EROFS", 1, "open", marks=pytest.mark.slow),
        pytest.param("EDQUOT", 0, "rename", marks=pytest.mark.slow),
    ],
)
def test_one_failed_save_is_said_and_training_goes_on(
    tmp_path: Path, whole: Ended, error: str, rank: int, operation: str
) -> None:
    ended = run(tmp_path, disk=f"{error} {rank} 8 {operation}")
    assert ended.codes == [0, 0], ended.errors
    assert ended.status["weights_sha256"] == whole.status["weights_sha256"]
    assert names(ended) == ["step-00000004", "step-00000010"]
    all_good(ended)
    (event,) = events(ended, "save_failed")
    assert event["step"] == 8
    assert f"rank {rank}: " in event["message"]
    assert "need 0.0 MiB a rank, have " in event["message"]
    assert event["message"] in ended.outputs[0] + ended.errors
    assert [event["step"] for event in events(ended, "save")] == [4, 10]


def test_three_failed_saves_in_a_row_end_the_run_on_all_ranks(tmp_path: Path) -> None:
    ended = run(
        tmp_path,
        "--save-every",
        "2",
        disk="ENOSPC 1 4 write, ENOSPC 1 6 write, ENOSPC 1 8 write",
        limit_s=15,
    )
    assert ended.codes == [1, 1], ended.errors
    assert (
        "3 checkpoints in a row could not be written. The last error: rank 1: No space left on device (need"
        in ended.errors
    )
    assert ended.status["status"] == "failed"
    assert [event["step"] for event in events(ended, "save_failed")] == [4, 6, 8]
    assert names(ended) == ["step-00000002"]


def test_a_run_whose_last_save_fails_has_not_finished(tmp_path: Path, whole: Ended) -> None:
    """Its result would be lost without a word; the next life has little left to do."""
    ended = run(tmp_path, disk="ENOSPC 0 10 write", limit_s=15)
    assert ended.codes == [1, 1], ended.errors
    assert "the last checkpoint could not be written" in ended.errors
    assert ended.status["status"] == "failed"
    ended = run(tmp_path)
    assert ended.codes == [0, 0]
    assert ended.status["weights_sha256"] == whole.status["weights_sha256"]


def test_a_stall_of_one_ranks_disk_does_not_stop_training(tmp_path: Path, whole: Ended) -> None:
    ended = run(tmp_path / "stalled", disk="wait 1 4 7", limit_s=30)
    said = ended.outputs[1]
    assert (
        said.index("the stall begins") < said.index("step 7 is done") < said.index("the stall ends")
    )
    assert ended.codes == [0, 0]
    assert ended.status["weights_sha256"] == whole.status["weights_sha256"]
    assert names(ended) == names(whole)
