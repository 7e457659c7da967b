"""The control packet: all ranks decide at the same step, and nobody waits for it."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import Settings, recipe
from torch import nn

from ddp_kit.distributed import control_packet
from ddp_kit.distributed.collectives import gather_rows
from ddp_kit.distributed.control_packet import INTERVAL_S, ControlPacket
from ddp_kit.distributed.process_group import Group
from ddp_kit.settings import EarlyStop
from ddp_kit.setup.build import build
from ddp_kit.stopping.early_stopping import EarlyStopping
from ddp_kit.stopping.signals import Stop, StopFlag, signals_noted
from ddp_kit.training.loop import Ending, fit
from ddp_kit.training.reporter import Reporter
from ddp_kit.training.step import should_stop, train_step

FOREVER = Settings(max_steps=100_000, micro_batch=6, log_every=50)


@dataclass
class Acts:
    """A callback that acts on one rank at one step."""

    act: Callable[[], None]
    at: int
    steps: list[int] = field(default_factory=list)

    def on_start(self, model: nn.Module) -> None: ...

    def on_step(self, step: int) -> None:
        self.steps.append(step)
        if step == self.at:
            self.act()

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def on_end(self, reason: str) -> None: ...


def trained(group: Group, *, stop: StopFlag, callbacks: Any) -> Ending:
    """Trains until something stops it."""
    made = build(recipe(FOREVER), FOREVER, group)
    ending = fit(
        made.training,
        made.feed.batches(start=0, end=made.cadence.end),
        cadence=made.cadence,
        report=Reporter([], log_every=50),
        evaluate=lambda epoch: {},
        early_stopping=EarlyStopping(EarlyStop()),
        stop=stop,
        callbacks=callbacks,
    )
    made.training.control_packet.close()
    return ending


class Clock:
    """Time as the packet sees it, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


def at_the_same(group: Group, number: int) -> bool:
    return len(set(torch.cat(gather_rows(group, torch.tensor([number]))).tolist())) == 1


@pytest.mark.ranks(1, 2, 4)
def test_a_signal_on_any_rank_stops_all_at_the_same_step(group: Group) -> None:
    for culprit in range(group.world_size):
        for number, status, code in (
            (signal.SIGTERM, "preempted", 143),
            (signal.SIGINT, "stopped", 130),
        ):
            with signals_noted() as stop:
                acts = Acts(
                    lambda number=number: os.kill(os.getpid(), number),
                    at=3 + culprit if group.rank == culprit else -1,
                )
                begin = time.monotonic()
                ending = trained(group, stop=stop, callbacks=[acts])
            expected = Ending(
                status=status,
                reason=f"{number.name} on rank {culprit}",
                exit_code=code,
                stop=Stop[number.name],
            )
            assert ending == expected
            assert at_the_same(group, acts.steps[-1])
            assert acts.steps[-1] >= 3 + culprit
            assert time.monotonic() - begin < 10 * INTERVAL_S + 5


@pytest.mark.ranks(2)
def test_a_loop_of_ones_own_stops_on_all_ranks_at_the_same_step(group: Group) -> None:
    made, stop = build(recipe(FOREVER), FOREVER, group), StopFlag()
    for batch in made.feed.batches(start=0, end=made.cadence.end):
        train_step(made.training, batch)
        if made.training.step == 5 and group.rank == 1:
            stop.handle(signal.SIGUSR1, None)
        if should_stop(made.training, stop):
            break
    made.training.control_packet.close()
    assert at_the_same(group, made.training.step)
    assert made.training.step < made.cadence.end


@pytest.mark.ranks(1, 2, 4)
def test_every_boundary_gives_every_rank_the_same_decision(group: Group) -> None:
    """Signals on several ranks: the highest number wins, and with it the name of the highest rank that had it."""
    control, seen = ControlPacket(group), []
    # A packet that is due before step 100 is sent at the latest after 1,000 steps, and read after as many.
    for step in range(1, 4000):
        decision = control.boundary(stop=Stop.SIGUSR1 if step > 100 else 0)
        seen.append((step, decision.stop, decision.stop_rank))
        if decision.stop:
            break
    control.close()
    assert seen[-1][1:] == (Stop.SIGUSR1, group.world_size - 1)
    assert at_the_same(group, hash(tuple(seen)))


@pytest.mark.ranks(2)
def test_packets_of_short_steps_are_sent_at_an_interval_that_the_packet_itself_gives(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1's steps take longer, and its pace is the one that counts; steps of any length are heard within about the interval."""
    for pause_s, steps in ((0.01 * (1 + group.rank), 60), (0.15, 6)):
        clock = Clock()
        monkeypatch.setattr(control_packet, "time", clock)
        control, due = ControlPacket(group), []
        for step in range(1, steps):
            clock.now += pause_s
            before = control._next
            control.boundary()
            if control._next != before:
                due.append(step)
        control.close()
        assert at_the_same(group, hash(tuple(due)))
        gaps = [b - a for a, b in pairwise(due)][2:]
        slowest = 0.02 if steps == 60 else 0.15
        assert max(gaps) <= max(1, INTERVAL_S / slowest)
        assert max(gaps) == 1 if steps == 6 else min(gaps) >= 2


@pytest.mark.ranks(2)
def test_a_boundary_does_not_wait_for_a_slow_peer(group: Group) -> None:
    control = ControlPacket(group)
    if group.rank == 1:
        time.sleep(1.0)
    begin = time.perf_counter()
    control.boundary()
    took = time.perf_counter() - begin
    control.close()
    assert took < 0.5
    assert (
        time.perf_counter() - begin > 0.5 or group.rank == 1
    )  # the packet itself did wait for the peer, at its reading


def test_a_signal_before_the_first_step_ends_the_run_and_later_ones_wait_for_a_boundary() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with signals_noted() as stop, pytest.raises(SystemExit) as caught:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert caught.value.code == 143
    with signals_noted() as stop:
        stop.deferring = True
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.stop is Stop.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.ranks(3)
def test_a_bad_loss_on_two_ranks_names_one_of_them_on_all(group: Group) -> None:
    control = ControlPacket(group)
    if group.rank != 1:
        control.name_culprit(7)
    decision = control.exchange()
    assert (decision.culprit_step, decision.culprit_rank, decision.stop) == (7, 2, 0)


@pytest.mark.ranks(2)
def test_a_save_that_is_asked_for_until_it_begins_is_decided_once(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(control_packet, "time", clock)
    control, asked, decided = ControlPacket(group), True, []
    for step in range(1, 8):
        clock.now += 0.11
        decision = control.boundary(saves=asked and group.rank == 0)
        if decision.saves:
            asked = False
            decided.append(step)
    control.close()
    assert decided == [2]
