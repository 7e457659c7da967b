"""What a rank tells the launcher that has started it, through pipes that it was given.

Their names stand in the environment, where a process that is no rank of ours may find them too: so
a name has the pipe's inode, and nothing is written into another file.
"""

import contextlib
import os
import struct
from pathlib import Path

from ddp_kit.distributed.topology import environment


def tell_run_folder(path: Path) -> None:
    """Tells where the run directory is: rank 0 of `ddp-kit run` calls it once it has begun."""
    _write("DDP_KIT_RUN_FOLDER", os.fsencode(path.absolute()) + b"\n")


def answer_guard() -> None:
    """Tells that this process has heard of its launcher's death, and leaves by itself."""
    _write("DDP_KIT_GUARD", struct.pack("<I", os.getpid()))


def _write(variable: str, content: bytes) -> None:
    number, _, inode = environment().get(variable, "").partition(":")
    if not number.isdecimal():
        return
    # Nobody reads it any more.
    with contextlib.suppress(OSError):
        if str(os.fstat(int(number)).st_ino) == inode:
            os.write(int(number), content)
