"""Whatever lives but does not move is named within its limit, on every rank alike, and nobody is left."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cases import classify, plain, vectors
from launching import Ended, train
from paths import KIT

from ddp_kit.testing import start_ranks

HOST = socket.gethostname()
HANGING = str(KIT / "hanging.py")
LIMIT_S = 3.0
SLOW = [pytest.mark.slow]
# Each phase is short here, but the beginning, in which a busy machine imports what it needs.
LIMITS = (
    f"--hang-timeout={LIMIT_S}",
    "--hang.start=60",
    "--hang.first-step=15",
    *(f"--hang.{phase}={LIMIT_S}" for phase in ("callback", "evaluation", "save", "end")),
)
NOTICED_S = 5.0
GONE_S = 15.0
START_S = 30.0
PLACES = {
    "data": ("data", 3),
    "forward": ("forward", 3),
    "backward": ("backward", 3),
    "optimizer": ("optimizer", 3),
    "callback": ("callback", 2),
    "evaluation": ("evaluation", 2),
    "on_evaluation": ("callback", 2),
    "save": ("save", None),
    "start": ("the start", 0),
    "end": ("the end", 6),
}


def hung(
    *flags: str, folder: Path, world_size: int = 2, env: dict[str, str | None] | None = None
) -> Ended:
    limit_s = START_S + LIMIT_S + NOTICED_S + GONE_S
    return train(
        *LIMITS,
        *flags,
        folder=folder,
        world_size=world_size,
        recipe=HANGING,
        limit_s=limit_s,
        env=env,
    )


def verdict_of(errors: str) -> str:
    """Returns the verdict, which is said once and before anything else."""
    lines = [line for line in errors.splitlines() if not line.startswith("to go on from step ")]
    verdicts = [line for line in lines if line.startswith("HUNG at step ")]
    assert len(verdicts) == 1, errors
    assert lines == verdicts, errors
    return verdicts[0]


def require_told(
    ended: Ended, *, rank: int, phase: str, step: int | None, frozen: bool = False
) -> str:
    """Checks everything that a user finds after a hang. Returns the verdict."""
    verdict = verdict_of(ended.errors)
    where = r"\d+" if step is None else str(step)
    head = rf"HUNG at step {where}: rank {rank} \(host {re.escape(HOST)}, pid \d+\) has been in {phase} for "
    found = re.match(head + r"(\d+) s", verdict)
    assert found, verdict
    assert LIMIT_S - 1 <= int(found[1]) <= LIMIT_S + NOTICED_S + 15, (
        verdict
    )  # the machine may be busy
    assert verdict.endswith(f". Stacks: {ended.run_dir}/stacks/")
    assert (ended.status["status"], ended.status["exit_code"]) == ("failed", 124)
    assert ended.status["reason"] == verdict
    for number, code in enumerate(ended.codes):
        assert code == 124 or (frozen and number == rank and code == -9), ended.codes
        assert (ended.run_dir / "stacks" / f"rank-{number}.txt").stat().st_size > 0
    assert ended.is_clean()
    return verdict


@pytest.mark.parametrize(
    ("place", "rank"),
    [
        ("data", 1),
        ("callback", 0),
        *(
            pytest.param(place, rank, marks=SLOW)
            for place in PLACES
            for rank in (0, 1)
            if (place, rank) not in (("data", 1), ("callback", 0))
        ),
    ],
)
def test_a_rank_that_sleeps_is_named_with_what_it_was_in(
    place: str, rank: int, tmp_path: Path
) -> None:
    flags = ["--hang.start=12"] if place == "start" else []
    ended = hung("--hang-in", place, "--at-rank", str(rank), *flags, folder=tmp_path)
    phase, step = PLACES[place]
    verdict = require_told(ended, rank=rank, phase=phase, step=step)
    assert f"rank {1 - rank} " in verdict  # which waits
    if place != "save":  # it is written beside training, where the main thread waits for it
        assert ", at " in verdict
        assert "hanging.py:" in verdict
        assert "in hang\n" in (ended.run_dir / "stacks" / f"rank-{rank}.txt").read_text()


@pytest.mark.parametrize(
    ("how", "rank", "words"),
    [
        ("gil", 0, "cannot run Python (something holds its GIL)"),
        pytest.param("stop", 0, "is stopped (SIGSTOP)", marks=SLOW),
        pytest.param("gil", 1, "cannot run Python (something holds its GIL)", marks=SLOW),
        pytest.param("stop", 1, "is stopped (SIGSTOP)", marks=SLOW),
        pytest.param("spin", 0, "", marks=SLOW),
        pytest.param("spin", 1, "", marks=SLOW),
    ],
)
def test_a_rank_that_cannot_run_python_is_named_and_ended_by_its_peer(
    how: str, rank: int, words: str, tmp_path: Path
) -> None:
    ended = hung("--hang-in=forward", "--how", how, "--at-rank", str(rank), folder=tmp_path)
    verdict = require_told(ended, rank=rank, phase="forward", step=3, frozen=how != "spin")
    assert words in verdict
    if how != "stop":
        assert "hanging.py:" in verdict


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=SLOW)])
def test_a_collective_of_one_rank_is_named_with_the_users_line(rank: int, tmp_path: Path) -> None:
    ended = hung("--hang-in=forward", "--how=order", "--at-rank", str(rank), folder=tmp_path)
    verdict = verdict_of(ended.errors)
    assert re.match(
        rf"HUNG at step 3: rank {rank} \(host .*, pid \d+\) entered a collective at \S*hanging.py:\d+ in forward that "
        rf"the others did not \(under `if rank`\?\); rank {1 - rank} waits in the gradient all-reduce\. Stacks: ",
        verdict,
    )
    assert ended.codes == [124, 124]
    assert ended.status["reason"] == verdict


@pytest.mark.parametrize("rank", [pytest.param(0, marks=SLOW), pytest.param(1, marks=SLOW)])
def test_a_collective_of_another_size_ends_at_once_and_says_who_was_where(
    rank: int, tmp_path: Path
) -> None:
    """gloo aborts the process of the one that gets more than it expects."""
    flags = ["--hang-in=forward", "--how=size", "--at-rank", str(rank)]
    # Ranks that are gone at once have not met yet.
    ended = hung(*flags, folder=tmp_path, env={"PACE_S": "1"})
    assert sorted(ended.codes) == [-6, 1]
    reason = ended.status["reason"]
    assert f"rank {rank} was in forward of step 3" in reason
    assert f"rank {1 - rank} was in backward of step 3" in reason


def test_a_loader_worker_that_hangs_is_named_with_its_sample(tmp_path: Path) -> None:
    ended = hung("--hang-in=worker", "--num-workers=2", "--at-rank=1", folder=tmp_path)
    verdict = require_told(ended, rank=1, phase="data", step=None)
    found = re.search(
        r"waiting for loader worker 1 \(pid (\d+)\), which reads sample (\d+)", verdict
    )
    assert found, verdict


@pytest.mark.slow
def test_of_four_ranks_the_two_that_hang_are_named_and_the_two_that_wait(tmp_path: Path) -> None:
    ended = hung("--hang-in=forward", "--at-rank=12", folder=tmp_path, world_size=4)
    verdict = verdict_of(ended.errors)
    assert re.search(r"ranks 1 \(host .*\), 2 \(host .*\) have been in forward for \d+ s", verdict)
    assert "; ranks 0, 3 wait in the gradient all-reduce. Stacks: " in verdict
    assert ended.codes == [124] * 4


def test_a_run_that_is_slow_everywhere_it_may_be_gets_no_verdict(tmp_path: Path) -> None:
    """A download in on_start, a long first step, evaluation, save, callback and end, each on rank 0 alone and beyond a step's limit."""
    flags = ["--hang-timeout=2", "--hang-in=everywhere", "--seconds=2.5", "--at-rank=0"]
    ended = train(*flags, folder=tmp_path, recipe=HANGING, limit_s=90, env={"PACE_S": "0.2"})
    assert ended.codes == [0, 0]
    assert ended.errors == ""
    assert ended.status["status"] == "finished"
    assert not (ended.run_dir / "stacks").exists()


def own_loop(errors: str, limit_s: float) -> None:
    """A loop of one's own, whose loss hangs on rank 1 in the third step."""
    import torch

    import ddp_kit

    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    step = 0

    def loss(model: Any, batch: Any) -> Any:
        if step == 3 and os.environ["RANK"] == "1":
            time.sleep(1000)
        return classify(model, batch)

    with ddp_kit.process_group(device="cpu", hang_timeout_s=limit_s) as group:
        torch.manual_seed(0)
        model = plain()
        feed = ddp_kit.build_loader(vectors(), group=group, global_batch=8)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        training = ddp_kit.wrap(model, optimizer, loss, group=group, feed=feed)
        group.pulse.limits = replace_first(group.pulse.limits)
        for batch in feed.batches(start=0, end=10):
            step += 1
            ddp_kit.train_step(training, batch)


def timeouts(limit_s: float) -> tuple[float, float]:
    """Returns what gloo waits at most, in a group that is watched, and in one that asked for less."""
    from torch import distributed as dist

    import ddp_kit
    from ddp_kit.watchdog.watch import watch

    found = []
    for timeout_s in (600.0, limit_s):
        with ddp_kit.process_group(device="cpu", timeout_s=timeout_s) as group:
            watch(group)
            group.shorten_timeouts()
            found.append(group.timeout_s)
            assert group.pg is not None
            backend = group.pg._get_backend(torch_device())
            assert dist.get_backend(group.pg) == "gloo"
            assert backend.options._timeout.total_seconds() == group.timeout_s
    return found[0], found[1]


def torch_device() -> Any:
    import torch

    return torch.device("cpu")


def test_gloo_does_not_give_up_before_the_verdict_but_where_that_was_asked_for() -> None:
    from ddp_kit.distributed.pulse import Limits

    with start_ranks(timeouts, 2, 30.0, group=False, deadline_s=60) as ranks:
        for watched, asked in ranks.values():
            assert watched > Limits().longest
            assert asked == 30.0


def replace_first(limits: Any) -> Any:
    from dataclasses import replace

    return replace(limits, first_step=15.0)


def test_a_loop_of_ones_own_is_watched_too(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    with start_ranks(own_loop, 2, str(errors), LIMIT_S, group=False, deadline_s=60) as ranks:
        reports = ranks.wait()
    assert [report.exit_code for report in reports] == [124, 124]
    verdict = verdict_of(errors.read_text())
    assert "rank 1 " in verdict
    assert "has been in forward for" in verdict
    assert "test_hangs.py:" in verdict


def command(*words: str, folder: Path, run: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*run, HANGING, *LIMITS, "--run-dir", str(folder / "run"), *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(KIT)},
        check=False,
    )


DDP_KIT_RUN = [sys.executable, "-m", "ddp_kit.cli.main", "run", "--nproc-per-node"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node=2",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=127.0.0.1:0",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "how", "at_rank", "words"),
    [
        ("2", "sleep", "1", "hanging.py:"),
        ("2", "gil", "0", "cannot run Python"),
        ("2", "stop", "1", "is stopped"),
        # No peer is there that could name it: its launcher does.
        ("1", "gil", "0", "cannot run Python"),
        ("2", "stop", "-1", "is stopped"),
        ("2", "gil", "-1", "cannot run Python"),
    ],
)
def test_under_ddp_kit_run_it_ends_with_124(
    ranks: str, how: str, at_rank: str, words: str, tmp_path: Path
) -> None:
    done = command(
        "--hang-in=forward",
        "--how",
        how,
        "--at-rank",
        at_rank,
        folder=tmp_path,
        run=[*DDP_KIT_RUN, ranks],
    )
    verdict = verdict_of(done.stderr)
    assert done.returncode == 124
    assert "has been in forward for" in verdict or "have been in forward for" in verdict
    assert words in verdict
    ended = Ended(codes=[done.returncode], outputs=[], errors=done.stderr, run_dir=tmp_path / "run")
    assert (ended.status["status"], ended.status["reason"]) == ("failed", verdict)
    assert ended.status["exit_code"] == 124
    assert ended.is_clean()
    assert list((tmp_path / "run" / "stacks").glob("rank-*.txt"))


@pytest.mark.slow
def test_a_loader_worker_that_hangs_does_not_outlive_its_rank(tmp_path: Path) -> None:
    flags = ["--hang-in=worker", "--num-workers=2", "--at-rank=1"]
    done = command(*flags, folder=tmp_path, run=[*DDP_KIT_RUN, "2"])
    found = re.search(r"loader worker 1 \(pid (\d+)\)", verdict_of(done.stderr))
    assert found
    end = time.monotonic() + 10
    while Path(f"/proc/{found[1]}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sleep", "gil", "stop"])
def test_under_torchrun_the_status_has_the_verdict(how: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    run = [*TORCHRUN, "-m", "ddp_kit.train"]
    done = command("--hang-in=forward", "--how", how, "--at-rank=1", folder=tmp_path, run=run)
    assert time.monotonic() - begin < START_S + LIMIT_S + NOTICED_S + GONE_S + 20
    assert done.returncode == 1  # torchrun makes every code that
    assert done.stderr.count("HUNG at step 3: rank 1 ") == 1
    ended = Ended(codes=[1], outputs=[], errors=done.stderr, run_dir=tmp_path / "run")
    assert ended.status["reason"].startswith("HUNG at step 3: rank 1 ")
    assert (ended.status["status"], ended.status["exit_code"]) == ("failed", 124)
