"""A stop is agreed upon in time, though steps were short when the next packet was planned and have become slow since."""

import re
import threading
from pathlib import Path

import pytest
from launching import train
from paths import KIT

from ddp_kit.distributed.boundaries import Boundaries
from ddp_kit.distributed.lost_peer import Loss, loss_of

SLOWING = str(KIT / "slowing.py")
# of 0.2 s and more; the next packet is hundreds away
FEW = 40
SLOW_FROM = 100
LIMIT_S = 60.0


@pytest.mark.parametrize("at_rank", [0, 1])
def test_a_stop_in_a_slow_spell_takes_few_steps(at_rank: int, tmp_path: Path) -> None:
    flags = ["--at-rank", str(at_rank)]
    ended = train(*flags, folder=tmp_path, recipe=SLOWING, limit_s=60)
    assert ended.codes == [143, 143], ended.errors
    assert ended.status["status"] == "preempted"
    assert SLOW_FROM + 2 <= ended.status["step"] <= SLOW_FROM + FEW
    assert len({output.splitlines()[-1] for output in ended.outputs[1:]}) == 1
    folder = tmp_path / "run" / "checkpoints" / f"step-{ended.status['step']:08d}"
    assert folder.is_dir()


def test_a_stop_in_a_slow_spell_of_an_evaluation_takes_few_micro_batches_on_all_ranks(
    tmp_path: Path,
) -> None:
    """There ranks go on without each other: one is ahead, and none passes the boundary that was agreed."""
    flags = ["--looks", "--eval-every", "4"]
    ended = train(*flags, folder=tmp_path, recipe=SLOWING, limit_s=60)
    assert ended.codes == [143, 143], ended.errors
    looks = [re.findall(r"ended after (\d+) looks: SIGTERM", text) for text in ended.outputs]
    assert looks[0] == looks[1]
    assert SLOW_FROM < int(looks[0][0]) <= SLOW_FROM + FEW
    assert ended.status["step"] == 4


def test_one_process_needs_no_packet(tmp_path: Path) -> None:
    ended = train("--at-rank", "0", folder=tmp_path, recipe=SLOWING, world_size=1, limit_s=60)
    assert ended.codes == [143], ended.errors
    assert ended.status["step"] <= SLOW_FROM + 5


def test_a_rank_that_has_promised_waits_until_it_knows_where_all_meet() -> None:
    boundaries = Boundaries(LIMIT_S)
    for _ in range(3):
        assert not boundaries.pass_one()
    assert boundaries.promise() == 4
    passed: list[bool] = []
    rank = threading.Thread(target=lambda: passed.append(boundaries.pass_one()))
    rank.start()
    rank.join(0.3)
    assert rank.is_alive()
    boundaries.meet_at(6)
    rank.join(LIMIT_S)
    assert passed == [False]
    assert boundaries.is_to_meet
    assert [boundaries.pass_one() for _ in range(3)] == [False, True, False]


def test_a_promise_that_the_others_do_not_answer_is_no_progress() -> None:
    boundaries = Boundaries(0.1)
    boundaries.promise()
    with pytest.raises(RuntimeError, match="Timed out waiting") as late:
        boundaries.pass_one()
    assert loss_of(late.value) is Loss.TIMEOUT
    boundaries.release()
    assert not boundaries.pass_one()
