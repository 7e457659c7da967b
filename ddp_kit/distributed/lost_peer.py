"""What an error of a collective says: that a peer is gone, that nothing moves, or neither.

It is told by the text, since torch has one class for all of it.
"""

from enum import Enum, auto

import torch.distributed as dist

from ddp_kit.errors import summary, text_of

CLOSED_SIGNS = (
    "Connection closed by",
    "Connection reset by",
    "Broken pipe",
    "Connection refused",
    "gloo/transport",
)
# Of NCCL's errors all others are a rank's own: invalid usage, memory, /dev/shm.
NCCL_CLOSED_SIGNS = (
    "Connection closed by",
    "Connection reset by",
    "Broken pipe",
    "Connection refused",
    "ncclRemoteError",
    "communicator was aborted",
)
TIMEOUT_SIGNS = ("timed out", "timing out", "timeout")
MOST_LINES = 6  # of an error of NCCL's; C++ frames may follow
FRAMES = "Exception raised from"


class Loss(Enum):
    """What an error says of the peers."""

    NONE = auto()  # it is this rank's own
    CLOSED = auto()  # a connection has closed
    TIMEOUT = auto()  # nothing has come in time: no progress, which is no death


def loss_of(error: BaseException) -> Loss:
    """Returns what an error says of the peers."""
    if not isinstance(error, RuntimeError):
        return Loss.NONE
    text = text_of(error)
    is_nccl = isinstance(error, dist.DistBackendError)
    is_network = isinstance(error, dist.DistNetworkError)
    is_closed = is_network or _has(text, NCCL_CLOSED_SIGNS if is_nccl else CLOSED_SIGNS)
    is_collective = is_closed or is_nccl or "Timed out waiting" in text
    if is_collective and _has(text.lower(), TIMEOUT_SIGNS):
        return Loss.TIMEOUT
    return Loss.CLOSED if is_closed else Loss.NONE


def _has(text: str, signs: tuple[str, ...]) -> bool:
    return any(sign in text for sign in signs)


def words_of(error: BaseException) -> str:
    """Returns an error's kind and message; of NCCL's its first lines in one."""
    message = summary(error)
    if not isinstance(error, dist.DistBackendError):
        return message
    lines = message.partition(FRAMES)[0].split("\n")
    told = [line.strip() for line in lines if line.strip()]
    return " ".join(told[:MOST_LINES])
