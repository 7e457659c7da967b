"""An error of a collective is told by its text: a peer that is gone, nothing that moves, or a rank's own fault."""

import socket
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from ddp_kit.distributed.failure import BROKEN, GONE, NO_PROGRESS
from ddp_kit.distributed.failures import FailureReport
from ddp_kit.distributed.lost_peer import Loss, loss_of, words_of
from ddp_kit.distributed.peers import this_process

NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
INVALID = (
    f"{NCCL}invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.28.9\n"
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
    "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"
)
SHM = (
    f"{NCCL}unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\n"
    "Last error:\nError while creating shared memory segment /dev/shm/nccl-Jq8Ty2 (size 9637888), error: No space left on device (28)"
)
MEMORY = (
    f"{NCCL}unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\n"
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'\n"
    "Exception raised from ncclCommInitRankConfig at /pytorch/x.cpp:300 (most recent call first):\nframe #0: c10::Error"
)
REMOTE = (
    f"{NCCL}remote process exited or there was a network error, NCCL version 2.28.9\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
    "Last error:\nNET/Socket : peer 10.0.0.3<51234> has closed"
)
CLOSED = (
    f"{NCCL}unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9\n"
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\n"
    "Last error:\nsocketProgress: Connection closed by remote peer n3<40112>"
)
WATCHDOG = (
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=ALLREDUCE, NumelIn=64, "
    "NumelOut=64, Timeout(ms)=10000) ran for 10056 milliseconds before timing out."
)
GLOO_CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:4711"
GLOO_LATE = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms "
    "for recv operation to complete"
)
GLOO_PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Application timeout caused pair closure"


@pytest.mark.parametrize(
    ("error", "loss"),
    [
        (dist.DistBackendError(INVALID), Loss.NONE),
        (dist.DistBackendError(SHM), Loss.NONE),
        (dist.DistBackendError(MEMORY), Loss.NONE),
        (dist.DistBackendError(REMOTE), Loss.CLOSED),
        (dist.DistBackendError(CLOSED), Loss.CLOSED),
        (
            dist.DistBackendError("NCCL communicator was aborted on rank 1. Original reason ..."),
            Loss.CLOSED,
        ),
        (dist.DistBackendError(WATCHDOG), Loss.TIMEOUT),
        (dist.DistNetworkError("Connection reset by peer"), Loss.CLOSED),
        (dist.DistNetworkError("The client socket has timed out after 60000ms"), Loss.TIMEOUT),
        (RuntimeError(GLOO_CLOSED), Loss.CLOSED),
        (RuntimeError(GLOO_LATE), Loss.TIMEOUT),
        (RuntimeError(GLOO_PAIR), Loss.TIMEOUT),
        (RuntimeError("my download timed out"), Loss.NONE),
        (TimeoutError("Timed out waiting for my server"), Loss.NONE),
        (ValueError("Connection closed by peer"), Loss.NONE),
        (MemoryError(), Loss.NONE),
    ],
)
def test_what_an_error_says_of_the_peers(error: BaseException, loss: Loss) -> None:
    assert loss_of(error) is loss


@pytest.mark.parametrize(
    ("text", "last"),
    [
        (INVALID, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"),
        (SHM, "No space left on device (28)"),
        (MEMORY, "Cuda failure 2 'out of memory'"),
    ],
)
def test_nccls_own_errors_are_a_ranks_own_and_shown_by_their_first_lines_in_one(
    text: str, last: str
) -> None:
    failure = FailureReport(rank=1, world_size=2, store=dist.HashStore()).find_culprit(
        dist.DistBackendError(text)
    )
    assert failure.is_own
    assert not failure.is_silent
    assert failure.culprit == 1
    assert failure.reason.startswith(f"rank 1: DistBackendError: {NCCL}")
    assert failure.reason.endswith(last)
    assert "\n" not in failure.reason
    assert words_of(dist.DistBackendError(text)) in failure.reason


def report(store: dist.Store | None, *, rank: int = 1, **changes: Any) -> FailureReport:
    """The report of one of two ranks whose processes both are this one, but for what is changed."""
    made = FailureReport(rank=rank, world_size=2, store=store)
    own = this_process()
    made.peers = [type(own)(**(vars(own) | changes)), own]
    return made


def test_a_timeout_among_living_processes_is_no_death_and_told_to_the_peers() -> None:
    store = dist.HashStore()
    failure = report(store).find_culprit(RuntimeError(GLOO_LATE))
    assert failure.is_hang
    assert failure.message.startswith(NO_PROGRESS)
    assert failure.message.endswith("every rank's process lives")
    assert failure.culprit == -1
    # a peer that only sees the connection close says the same
    follower = report(store, rank=0).find_culprit(RuntimeError(GLOO_CLOSED))
    assert follower.is_hang
    assert follower.message == failure.message
    assert follower.words() == f"rank 0 on {socket.gethostname()}: {failure.message}\n"


def test_a_timeout_is_a_death_where_the_process_has_ended() -> None:
    for text in (GLOO_LATE, GLOO_CLOSED):
        failure = report(dist.HashStore(), start="1").find_culprit(RuntimeError(text))
        assert failure.message == f"{GONE}; not heard of: rank 0"
        assert failure.culprit == 0
        assert not failure.is_hang


def test_a_connection_that_breaks_between_living_processes_is_no_death() -> None:
    failure = report(dist.HashStore()).find_culprit(RuntimeError(GLOO_CLOSED))
    assert failure.message.startswith(BROKEN)


def test_of_another_hosts_processes_nothing_is_said() -> None:
    failure = report(dist.HashStore(), host="elsewhere").find_culprit(RuntimeError(GLOO_LATE))
    assert failure.message.endswith("no rank's process is known to be gone")
    failure = report(dist.HashStore(), host="elsewhere").find_culprit(RuntimeError(GLOO_CLOSED))
    assert failure.message.startswith(GONE)


class Deaf:
    """A store whose host has stopped, until the test is over."""

    def __init__(self) -> None:
        self.over = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return lambda *asked: self.over.wait(60)


def test_a_store_that_never_answers_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddp_kit.distributed.failures.ANSWER_S", 0.3)
    begin = time.monotonic()
    deaf = Deaf()
    made = report(deaf)  # type: ignore[arg-type]  # as far as a store is asked
    failure = made.find_culprit(RuntimeError(GLOO_LATE))
    assert failure.is_hang
    assert not made.is_awaited
    made.linger()
    assert time.monotonic() - begin < 20
    deaf.over.set()
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "ask-store")
    thread.join(20)
