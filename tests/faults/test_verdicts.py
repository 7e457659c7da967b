"""Who is to blame, from what all ranks said last: the rules, without processes."""

from dataclasses import replace
from typing import Any

import pytest

from ddp_kit.distributed.pulse import AFTER_STEP, FACTOR, LEAST_S, PASSES, Limits, Phase, Pulse
from ddp_kit.io.pulse_file import PHASES
from ddp_kit.watchdog.judge import judge
from ddp_kit.watchdog.news import News, Seen, read_news


def seen(rank: int, phase: Phase, *, step: int = 37, **more: Any) -> Seen:
    given: dict[str, Any] = {"host": f"n{rank}", "pid": 80 + rank, "idle_s": 60.0, "limit_s": 60.0}
    return Seen(news=News(rank=rank, phase=phase, step=step, **(given | more)))


def text(*ranks: Seen) -> str:
    verdict = judge(ranks)
    return "" if verdict is None else verdict.text


def test_the_one_furthest_behind_is_the_culprit_and_the_others_wait() -> None:
    waiting = [seen(rank, Phase.BACKWARD, part=PASSES) for rank in (0, 2, 3)]
    assert text(*waiting, seen(1, Phase.DATA)) == (
        "HUNG at step 37: rank 1 (host n1, pid 81) has been in data for 60 s; "
        "ranks 0, 2, 3 wait in the gradient all-reduce"
    )


def test_nobody_is_blamed_while_the_one_behind_may_still_take_its_time() -> None:
    """Others wait longer than they may, but for one whose phase may last."""
    slow = seen(1, Phase.CALLBACK, step=36, part=AFTER_STEP, idle_s=300.0, limit_s=600.0)
    assert text(seen(0, Phase.BACKWARD, idle_s=300.0), slow) == ""
    assert "rank 1 " in text(seen(0, Phase.BACKWARD, idle_s=700.0), replace(slow, silent_s=300.0))


def test_a_pass_is_counted_from_the_last_one() -> None:
    """Rank 0 has two micro-batches and waits after them, rank 1 hangs in the third of three."""
    pulses = [Pulse(), Pulse()]
    for left in (2, 1):
        pulses[0].begin_pass(0, left=left)
    pulses[0].mark(Phase.BACKWARD)
    for left in (3, 2, 1):
        pulses[1].begin_pass(0, left=left)
    ranks = [seen(rank, pulse.phase, part=pulse.part) for rank, pulse in enumerate(pulses)]
    assert "rank 1 (host n1, pid 81) has been in forward" in text(*ranks)
    # With split weights a rank waits in the forward pass of the next micro-batch for one that is still in a backward pass.
    for pulse, left in zip(pulses, (1, 2), strict=True):
        pulse.begin_pass(0, left=left)
    pulses[1].mark(Phase.BACKWARD)
    ranks = [seen(rank, pulse.phase, part=pulse.part) for rank, pulse in enumerate(pulses)]
    assert "rank 1 (host n1, pid 81) has been in backward" in text(*ranks)


def test_at_one_place_the_one_that_has_entered_fewer_collectives_is_the_culprit() -> None:
    ranks = [
        seen(rank, Phase.BACKWARD, sequences={"training": 9 - (rank == 2)}) for rank in range(3)
    ]
    assert "rank 2 (host n2, pid 82) has been in backward for 60 s; ranks 0, 1 wait" in text(*ranks)


def test_where_all_wait_in_one_collective_the_network_is_named() -> None:
    ranks = [
        seen(rank, Phase.BACKWARD, sequences={"training": 9}, is_waiting=True) for rank in range(3)
    ]
    verdict = judge(ranks)
    assert verdict is not None
    assert verdict.culprits == ()
    assert (
        "all 3 ranks have been waiting in the same collective in backward for 60 s: the network between n0, n1, n2"
        in verdict.text
    )


def test_where_all_hang_in_their_own_code_that_is_named_and_not_the_network() -> None:
    ranks = [seen(rank, Phase.CALLBACK, line="recipe.py:7") for rank in range(2)]
    assert (
        "ranks 0 (host n0, pid 80), 1 (host n1, pid 81) have been in callback for 60 s, at recipe.py:7"
        in text(*ranks)
    )


def test_a_collective_under_an_if_is_named_with_its_line() -> None:
    alone = seen(
        0, Phase.CALLBACK, step=36, sequences={"training": 9}, is_waiting=True, line="recipe.py:9"
    )
    other = seen(1, Phase.BACKWARD, sequences={"training": 9})
    assert (
        "rank 0 (host n0, pid 80) entered a collective at recipe.py:9 in callback that the others did not"
        in text(alone, other)
    )
    # One that the others have entered too, and left, is no such thing.
    assert "entered" not in text(
        replace(alone, news=replace(alone.news, sequences={"training": 8})), other
    )


def test_ranks_that_have_left_are_not_waited_for() -> None:
    gone = Seen(news=News(rank=1, has_left=True))
    assert "rank 0 (host n0, pid 80) has been in the end" in text(seen(0, Phase.END), gone)
    assert judge([gone]) is None


def test_many_ranks_make_no_long_line() -> None:
    ranks = [seen(rank, Phase.DATA) for rank in range(500)] + [seen(500, Phase.BACKWARD)]
    assert len(text(*ranks)) < 500
    assert "492 more" in text(*ranks)


def test_news_travel_whole_and_what_is_no_news_is_none() -> None:
    news = seen(3, Phase.SAVE, sequences={"training": 2}, line="a.py:1").news
    assert read_news(news.text()) == news
    for bad in ("", "[]", "{}", '{"rank": 1, "phase": 99}', "null"):
        assert read_news(bad) is None


@pytest.mark.parametrize("slowest_s", [0.01, 5.0, 20.0])
def test_a_step_has_ten_times_the_slowest_one_and_at_least_a_minute(slowest_s: float) -> None:
    pulse = Pulse()
    pulse.begin_step(1)
    assert pulse.limit_s == Limits().first_step
    pulse.end_step()
    pulse.begin_step(2)
    pulse._began -= slowest_s
    pulse.end_step()
    pulse.begin_step(3)
    assert pulse.limit_s == pytest.approx(max(LEAST_S, FACTOR * slowest_s), rel=0.1)
    pulse.limits = replace(pulse.limits, compiles=True)
    assert pulse.limit_s >= Limits().first_step  # it may be compiled anew


def test_phases_have_the_same_names_for_the_launcher() -> None:
    assert [phase.name.lower() for phase in Phase] == list(PHASES)
